"""Dense causal attention over packed documents through the best library kernel: the baseline NSA is compared with.

On a GPU the backend is chosen by shape and forced, never left to a silent fallback:

    flash4     FlashAttention-4 over all documents at once, where its package is installed: the fastest on Hopper
    cudnn      SDPA; the fastest of PyTorch's, and its only fast one with key and value widths that differ
    varlen     FlashAttention-2 over all documents at once, where many short ones would have to be padded for cuDNN
    flash      FlashAttention-2 by SDPA
    efficient  SDPA's memory-efficient kernel with an explicit mask; slow, takes everything
    torch      whatever PyTorch picks: CPUs, fp32, fp64

SDPA has no packed form: documents of one length go through it together.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from nsa_train.ops import flash4
from nsa_train.ops.reference import win_visible

log = logging.getLogger("nsa_train")

SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Documents are padded to a multiple of so many tokens for cuDNN, which makes a plan for every shape that it meets:
# milliseconds, where packs bring new lengths in every batch.
CUDNN_TOKENS = 512
MOST_PADDED = 1.25  # times the tokens; with more padding, one call without any is faster
FLASH4_WIDTHS = {(64, 64), (128, 128), (192, 128)}  # of keys and values, where it was measured as the fastest


def flash4_takes(key_dim: int, value_dim: int) -> bool:
    """Whether FlashAttention-4 is here, and was measured as the fastest at these widths."""
    return (key_dim, value_dim) in FLASH4_WIDTHS and flash4.kernels() is not None


def choose_backend(q: Tensor, v: Tensor, lengths: Sequence[int], window: int | None) -> str:
    """The name of the backend that is fastest for these inputs."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return "torch"
    widths = q.shape[-1], v.shape[-1]
    if window is None and flash4_takes(*widths):
        return "flash4"
    if window is not None:
        return "varlen" if widths[0] == widths[1] else "efficient"
    padded = sum(-(-length // CUDNN_TOKENS) * CUDNN_TOKENS for length in lengths)
    return "varlen" if padded > MOST_PADDED * sum(lengths) and widths[0] == widths[1] else "cudnn"


class Places(NamedTuple):
    """Where tokens lie when documents are padded and those of one length stand together: R rows.

    groups  documents and their padded length, one pair a group, in the order of the rows
    token   [R]  int64, of each row; of padding, any of its document
    real    [R]  bool, no padding
    row     [T]  int64, of each token
    """

    groups: tuple[tuple[int, int], ...]
    token: Tensor
    real: Tensor
    row: Tensor


@functools.lru_cache(maxsize=2)  # the same for every layer of a pass
def places(lengths: tuple[int, ...], multiple: int, device: torch.device) -> Places | None:
    """For documents padded to a multiple of so many tokens; None: everything stays where it is."""
    padded = [-(-length // multiple) * multiple for length in lengths]
    order = sorted(range(len(lengths)), key=lambda i: padded[i])
    groups = tuple((len(list(same)), length) for length, same in itertools.groupby(padded[i] for i in order))
    inside = [np.arange(padded[i]) for i in order]
    starts = np.cumsum([0, *lengths])
    token = np.concatenate([starts[i] + np.minimum(at, lengths[i] - 1) for i, at in zip(order, inside, strict=True)])
    real = np.concatenate([at < lengths[i] for i, at in zip(order, inside, strict=True)])
    if len(groups) == 1 and real.all():
        return None
    row = np.empty(sum(lengths), np.int64)
    row[token[real]] = np.flatnonzero(real)
    return Places(groups, *(_to_device(x, device) for x in (token, real, row)))


@functools.lru_cache(maxsize=2)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[N + 1] int32, where documents begin and end."""
    return _to_device(np.cumsum([0, *lengths], dtype=np.int32), device)


def _to_device(x: np.ndarray, device: torch.device) -> Tensor:
    """By way of pinned memory, so that nobody waits for what the GPU has yet to do."""
    there = torch.from_numpy(x)
    return there.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else there


def _spread(x: Tensor, at: Places) -> Tensor:
    return torch.where(at.real[:, None, None], x[at.token], 0)


class _ToRows(torch.autograd.Function):
    """[T, H, D] -> [R, H, D], zeros in the padding."""

    @staticmethod
    def forward(ctx, x: Tensor, at: Places) -> Tensor:
        ctx.at = at
        return _spread(x, at)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad[ctx.at.row], None


class _ToTokens(torch.autograd.Function):
    """[R, H, D] -> [T, H, D]"""

    @staticmethod
    def forward(ctx, x: Tensor, at: Places) -> Tensor:
        ctx.at = at
        return x[at.row]

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _spread(grad, ctx.at), None


@functools.cache
def _log_once(backend: str, D: int, Dv: int) -> None:
    log.info("dense attention with widths %d/%d runs on %s", D, Dv, backend)


@torch.compiler.disable  # documents differ in every batch, and each time it would be compiled anew
def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int],
    scale: float | None = None, window: int | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention inside each document.

    q        [T, Hq, D]
    k, v     [T, Hk, D], [T, Hk, Dv]
    lengths                tokens of each document, summing to T
    window                 tokens a query sees, its own included; None: all before it
    backend                a name of this module's list; None: the fastest for these inputs
    gives    [T, Hq, Dv]
    """
    if backend is None:
        backend = choose_backend(q, v, lengths, window)
        if q.is_cuda:
            _log_once(backend, q.shape[-1], v.shape[-1])
    q, k, v = (x.contiguous() for x in (q, k, v))  # kernels want rows that begin at a multiple of 16 bytes
    if backend in ("flash4", "varlen"):
        bounds = _bounds(tuple(lengths), q.device)
        packed = flash4.packed_attention if backend == "flash4" else _varlen
        return packed(q, k, v, bounds, max(lengths), window, scale)
    at = places(tuple(lengths), CUDNN_TOKENS if backend == "cudnn" else 1, q.device)
    if at is None:
        return _by_length(q, k, v, ((len(lengths), lengths[0]),), scale, window, backend)
    q, k, v = (_ToRows.apply(x, at) for x in (q, k, v))
    return _ToTokens.apply(_by_length(q, k, v, at.groups, scale, window, backend), at)


def recorded_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    """`dense_attention` where only the device knows the documents: in a pass that a CUDA graph records.

    q, k, v  as there, bf16 or fp16
    bounds   [N + 1]  int32, where documents begin and end; those at the end may be empty

    RuntimeError where FlashAttention-4 cannot be used, the one library kernel that needs no length on the host.
    """
    q, k, v = (x.contiguous() for x in (q, k, v))
    return flash4.packed_attention(q, k, v, bounds, len(q), None, None)


def _by_length(
    q: Tensor, k: Tensor, v: Tensor, groups: Sequence[tuple[int, int]],
    scale: float | None, window: int | None, backend: str,
) -> Tensor:  # fmt: skip
    """SDPA of documents that stand in groups of one length."""
    G = q.shape[1] // k.shape[1]
    sizes = [documents * length for documents, length in groups]
    outputs = []
    for (documents, length), *parts in zip(groups, *(x.split(sizes) for x in (q, k, v)), strict=True):
        mask = None if window is None or length <= window else win_visible(length, window, q.device)
        heads = [x.unflatten(0, (documents, length)).transpose(1, 2) for x in parts]  # [documents, heads, L, width]
        if backend == "efficient":  # the only one here that refuses grouped heads
            heads[1:] = [x.repeat_interleave(G, dim=1) for x in heads[1:]]
        if backend == "torch":
            o = _sdpa(heads, mask, scale)
        else:
            with sdpa_kernel(SDPA[backend]):
                o = _sdpa(heads, mask, scale)
        outputs.append(o.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _sdpa(heads: list[Tensor], mask: Tensor | None, scale: float | None) -> Tensor:
    grouped = heads[0].shape[1] != heads[1].shape[1]
    return F.scaled_dot_product_attention(
        *heads, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, window: int | None, scale: float | None
) -> Tensor:
    arguments = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # older releases group heads by themselves
        arguments["enable_gqa"] = q.shape[1] != k.shape[1]
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, **arguments)
