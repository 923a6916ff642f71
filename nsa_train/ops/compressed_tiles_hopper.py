"""What the Hopper kernels of the compressed branch and of the importance share: sizes, tiles, TMA descriptors.

One size of blocks (l = 32, d = 16, l' = 64) and of groups (G = 16) is built in, and tiles of 8 tokens times 16 heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa_train.ops.gluon_names import tma_load
from nsa_train.ops.reference import NSASpec
from nsa_train.ops.tiles import is_hopper

PIECE = 8  # tokens in a tile of forward, dQ and importance
PIECES = 8  # in a tile of the table


def takes_heads(q: Tensor, v: Tensor) -> bool:
    """The Hopper kernels are built for q [T, Hq, D] and v [rows, Hk, Dv] of these types and sizes."""
    (Hq, D), (Hk, Dv) = q.shape[1:], v.shape[1:]
    return (
        is_hopper(q.device)
        and q.dtype in (torch.bfloat16, torch.float16)
        and Hq == 16 * Hk
        and (D, Dv) in ((64, 64), (128, 128), (192, 128))
    )


def takes(q: Tensor, k: Tensor, v: Tensor, spec: NSASpec) -> bool:
    """Whether compressed attention and importance run for q [T, Hq, D], k [C, Hk, D], v [C, Hk, Dv]."""
    paper = (spec.cmp_block, spec.cmp_stride, spec.slc_block) == (32, 16, 64)
    return takes_heads(q, v) and paper and len(k) > 0


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, gl.NVMMASharedLayout(128, 16, len(block)))


def query_descriptors(x: Tensor, tokens: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """[tokens, 16 heads] of x [T, Hq, width], its first 128 columns and its last 64; twice the first up to 128."""
    first = _descriptor(x, [tokens, 16, min(x.shape[2], 128)])
    return first, _descriptor(x, [tokens, 16, 64]) if x.shape[2] > 128 else first


def head_major_descriptors(q: Tensor, tokens: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """[16 heads, tokens] of q [T, Hq, D], as above."""
    heads = q.transpose(0, 1)
    first = _descriptor(heads, [16, tokens, min(q.shape[2], 128)])
    return first, _descriptor(heads, [16, tokens, 64]) if q.shape[2] > 128 else first


def key_descriptors(x: Tensor, keys: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """[keys] rows of one KV head of x [C, Hk, width], as above."""
    flat = x.view(len(x), -1)
    first = _descriptor(flat, [keys, min(x.shape[2], 128)])
    return first, _descriptor(flat, [keys, 64]) if x.shape[2] > 128 else first


def row_descriptor(x: Tensor, tokens: int) -> TensorDescriptor:
    """[tokens, 16 heads] of lse or delta [T, Hq]."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [tokens, 16], gl.NVMMASharedLayout(0, 32, 2))


@gluon.jit
def keys_seen(position):
    """How many compressed keys the token at `position` of its document sees: 16 c + 31 <= position."""
    return gl.maximum(position - 15, 0) // 16


@gluon.jit
def token_piece(table, M, piece):
    """(start, end, doc_start, doc_cmp) of a piece of 8 tokens; empty: start >= end."""
    tile = table + piece // 8
    start = gl.load(tile) + piece % 8 * 8
    return start, gl.minimum(start + 8, gl.load(tile + M)), gl.load(tile + 2 * M), gl.load(tile + 4 * M)


@gluon.jit
def load_wide(desc1, desc2, buffer1, buffer2, bar, row, column, D2: gl.constexpr, pred=True):
    """Asks for rows of keys, columns `column` on, into one buffer for 128 columns and one for the last 64."""
    tma_load(desc1, [row, column], bar, buffer1, pred)
    if D2 > 0:
        tma_load(desc2, [row, column + 128], bar, buffer2, pred)


@gluon.jit
def load_wide_queries(desc1, desc2, buffer1, buffer2, bar, token, head, D2: gl.constexpr, pred=True):
    tma_load(desc1, [token, head, 0], bar, buffer1, pred)
    if D2 > 0:
        tma_load(desc2, [token, head, 128], bar, buffer2, pred)
