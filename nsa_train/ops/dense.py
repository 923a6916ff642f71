"""Dense causal attention over packed documents through the best library kernel: the baseline NSA is compared with.

On a GPU the backend is chosen by shape and forced, never left to a silent fallback:

    cudnn      SDPA, document by document; the fastest for one, and the only one with key and value widths that differ
    varlen     FlashAttention-2 over all documents at once: a call each would keep the GPU waiting for the host
    flash      FlashAttention-2, document by document
    efficient  SDPA's memory-efficient kernel with an explicit mask; slow, takes everything
    torch      whatever PyTorch picks: CPUs, fp32, fp64
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from nsa_train.ops.reference import win_visible

log = logging.getLogger("nsa_train")

SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Documents are padded to a multiple of so many tokens for cuDNN, which makes a plan for every length that it meets:
# milliseconds, where packs bring new lengths in every batch.
CUDNN_TOKENS = 512


def choose_backend(q: Tensor, v: Tensor, lengths: Sequence[int], window: int | None) -> str:
    """The name of the backend that is fastest for these inputs."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return "torch"
    if window is not None:
        return "varlen" if q.shape[-1] == v.shape[-1] else "efficient"
    return "varlen" if len(lengths) > 1 and q.shape[-1] == v.shape[-1] else "cudnn"


@functools.cache
def _log_once(backend: str, D: int, Dv: int) -> None:
    log.info("dense attention with widths %d/%d runs on %s", D, Dv, backend)


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
    if backend == "varlen":
        return _varlen(q, k, v, lengths, scale, window)
    G = q.shape[1] // k.shape[1]
    outputs = []
    for qd, kd, vd in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        L = len(qd)
        if backend == "cudnn" and L % CUDNN_TOKENS:  # no token sees what is behind it
            qd, kd, vd = (F.pad(x, (0, 0, 0, 0, 0, -L % CUDNN_TOKENS)) for x in (qd, kd, vd))
        mask = None if window is None or len(qd) <= window else win_visible(len(qd), window, q.device)
        heads = [x.transpose(0, 1)[None] for x in (qd, kd, vd)]  # [1, heads, L, width]
        if backend == "efficient":  # the only one here that refuses grouped heads
            heads[1:] = [x.repeat_interleave(G, dim=1) for x in heads[1:]]
        if backend == "torch":
            o = _sdpa(heads, mask, scale)
        else:
            with sdpa_kernel(SDPA[backend]):
                o = _sdpa(heads, mask, scale)
        outputs.append(o[0].transpose(0, 1)[:L])
    return torch.cat(outputs)


def _sdpa(heads: list[Tensor], mask: Tensor | None, scale: float | None) -> Tensor:
    grouped = heads[0].shape[1] != heads[1].shape[1]
    return F.scaled_dot_product_attention(
        *heads, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def _varlen(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float | None, window: int | None) -> Tensor:
    bounds = F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    bounds = bounds.pin_memory().to(q.device, non_blocking=True)
    arguments = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # older releases group heads by themselves
        arguments["enable_gqa"] = q.shape[1] != k.shape[1]
    longest = max(lengths)
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, **arguments)
