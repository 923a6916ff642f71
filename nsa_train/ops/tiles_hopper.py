"""What the Hopper kernels share: sizes, tiles, TMA descriptors.

Groups of G = 16 heads and tiles of 8 tokens times 16 heads are built in; `keys_seen` and `takes` hold the paper's
blocks (l = 32, d = 16, l' = 64). The kernels of dK and dV of compressed attention and window share their step but for
the masks.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
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


@functools.cache
def programs(device: torch.device) -> int:
    """Programs of a persistent kernel: each fills the shared memory of a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count


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


def chunk_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """[rows, 64 columns] of x [any, width]."""
    return _descriptor(x, [rows, 64])


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


@gluon.jit
def scores(q1, q2, k1, k2, zero, D2: gl.constexpr):
    """S = Q K^T of one tile of keys [keys, D], in flight; q1, k1: the first columns, q2, k2: the last D2."""
    s = warpgroup_mma(q1, k1.permute((1, 0)), zero, use_acc=False, is_async=True)
    if D2 > 0:
        s = warpgroup_mma(q2, k2.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def add_dq(dq1, dq2, ds, k1, k2, S1: gl.constexpr, S2: gl.constexpr, D2: gl.constexpr):
    """dQ + dS K, arrived; S1, S2: dS as operand of the first columns and of the last D2."""
    x1 = warpgroup_mma(gl.convert_layout(ds, S1), k1, dq1, is_async=True)
    x2 = dq2
    if D2 > 0:
        x2 = warpgroup_mma(gl.convert_layout(ds, S2), k2, dq2, is_async=True)
    return wide_arrive(x1, x2, D2)


@gluon.jit
def store_dq(
    dq_ptr, dq, first_token, end, g, Hq: gl.constexpr, D: gl.constexpr, FIRST: gl.constexpr, WIDTH: gl.constexpr,
    LAYOUT: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    token = first_token + row // 16
    at = (token.to(gl.int64) * Hq + g * 16 + row % 16) * D + FIRST
    at = dq_ptr + at[:, None] + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    mask = (token < end)[:, None]
    if ADD:
        dq = dq + gl.load(at, mask=mask, other=0.0).to(gl.float32)
    gl.store(at, dq.to(dq_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def pack_halves(x, HALF: gl.constexpr):
    """Rounds pairs to packed halves. Written by hand: a conversion that is also used in arithmetic comes out scalar."""
    if gl.bfloat16 == HALF:
        y = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        y = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=True, pack=2
        )
    return y


@gluon.jit
def fill_queries(
    q1_desc, q2_desc, lse_desc, q1_buf, q2_buf, lse_buf, q_full, stage, token, g, pred,
    D: gl.constexpr, D2: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(q_full.index(stage), 64 * D * 2 + 256, pred)
    load_wide_queries(
        q1_desc, q2_desc, q1_buf.index(stage), q2_buf.index(stage), q_full.index(stage), token, g * 16, D2, pred
    )
    tma_load(lse_desc, [token, g * 16], q_full.index(stage), lse_buf.index(stage), pred)


@gluon.jit
def fill_gradients(do_desc, delta_desc, do_buf, delta_buf, do_full, stage, token, g, pred, DV: gl.constexpr):
    mbarrier.expect(do_full.index(stage), 64 * DV * 2 + 256, pred)
    tma_load(do_desc, [token, g * 16, 0], do_full.index(stage), do_buf.index(stage), pred)
    tma_load(delta_desc, [token, g * 16], do_full.index(stage), delta_buf.index(stage), pred)


@gluon.jit
def transposed_scores(k1_buf, k2_buf, q1_buf, q2_buf, stage, zero, D1: gl.constexpr, D2: gl.constexpr):
    q1 = q1_buf.index(stage).reshape([64, D1])
    s = warpgroup_mma(k1_buf, q1.permute((1, 0)), zero, use_acc=False, is_async=True)
    if D2 > 0:
        q2 = q2_buf.index(stage).reshape([64, D2])
        s = warpgroup_mma(k2_buf, q2.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def score_columns(buffer, stage, S: gl.constexpr, COLUMNS: gl.constexpr):
    """[4 tokens, 16 heads] of lse or delta as the 64 columns of a score tile."""
    x = buffer.index(stage).load(COLUMNS).reshape([64])
    return gl.convert_layout(x, gl.SliceLayout(0, S), assert_trivial=True)


@gluon.jit
def dkv_products(
    position, q_stage, phase, j, p, dk1, dk2, dv, k1_buf, k2_buf, v_buf, q1_buf, q2_buf, do_buf, lse_buf, delta_buf,
    q_full, do_full, q1_desc, q2_desc, do_desc, lse_desc, delta_desc, first, origin, g, zero,
    D: gl.constexpr, DV: gl.constexpr, D2: gl.constexpr, S: gl.constexpr, COLUMNS: gl.constexpr,
    P1: gl.constexpr, P2: gl.constexpr, PV: gl.constexpr,
):  # fmt: skip
    """One step of dK and dV, 4 tokens from `position`: (next_stage, S of the 4 before them, dV, dK in flight).

    Enters with their P and nothing in flight. q_stage: stage of their Q (of 3); phase: of the next tile's stage; j:
    counts tiles, for the 2 stages of dO; first: no token before it; origin: packed token of position 0.
    """
    HALF: gl.constexpr = q1_buf.dtype
    D1: gl.constexpr = D - D2
    do_stage = j & 1
    mbarrier.wait(do_full.index(do_stage), (j >> 1) & 1)
    do = do_buf.index(do_stage).reshape([64, DV])
    dp = warpgroup_mma(v_buf, do.permute((1, 0)), zero, use_acc=False, is_async=True)
    dv = warpgroup_mma(gl.convert_layout(p, PV), do, dv, is_async=True)
    next_stage = gl.where(q_stage == 2, 0, q_stage + 1)
    free_stage = gl.where(next_stage == 2, 0, next_stage + 1)
    # refills run under the two products: stages of the previous tile, free since the barrier at its end
    fill_queries(
        q1_desc, q2_desc, lse_desc, q1_buf, q2_buf, lse_buf, q_full, free_stage, origin + position - 8, g,
        position - 8 >= first, D, D2,
    )  # fmt: skip
    fill_gradients(
        do_desc, delta_desc, do_buf, delta_buf, do_full, do_stage ^ 1, origin + position - 4, g,
        position - 4 >= first, DV,
    )  # fmt: skip
    dp = warpgroup_mma_wait(1, deps=[dp])
    ds = pack_halves(p.to(gl.float32) * (dp - score_columns(delta_buf, do_stage, S, COLUMNS)[None, :]), HALF)
    dv = warpgroup_mma_wait(0, deps=[dv])
    mbarrier.wait(q_full.index(next_stage), phase, pred=position - 4 >= first)  # after the last tile: result unused
    s = transposed_scores(k1_buf, k2_buf, q1_buf, q2_buf, next_stage, zero, D1, D2)
    x1 = warpgroup_mma(gl.convert_layout(ds, P1), q1_buf.index(q_stage).reshape([64, D1]), dk1, is_async=True)
    x2 = dk2
    if D2 > 0:
        x2 = warpgroup_mma(gl.convert_layout(ds, P2), q2_buf.index(q_stage).reshape([64, D2]), dk2, is_async=True)
    s = warpgroup_mma_wait(2 if D2 > 0 else 1, deps=[s])
    return next_stage, s, dv, x1, x2


@gluon.jit
def wide_arrive(x1, x2, D2: gl.constexpr):
    """Sums of the first columns and of the last D2, once the products in flight are done."""
    if D2 > 0:
        x1, x2 = warpgroup_mma_wait(0, deps=[x1, x2])
    else:
        x1 = warpgroup_mma_wait(0, deps=[x1])
    return x1, x2
