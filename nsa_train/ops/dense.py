"""Dense causal attention over packed documents through PyTorch's own kernels: the baseline NSA is compared with.

A loop over documents, whose bounds the loader knows on the CPU, so each call is plain causal attention and takes the
fastest kernel there is. On a GPU the backend is forced, never left to a silent fallback: cuDNN is the only one that
takes different key and value widths, flash needs no plan per length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa_train.ops.reference import win_visible


def backend_for(q: Tensor, v: Tensor, window: int | None) -> SDPBackend | None:
    """The forced SDPA backend on a GPU; None leaves a CPU (and fp32 or fp64 on a GPU) to PyTorch."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return None
    if window is not None:
        return SDPBackend.EFFICIENT_ATTENTION  # takes the band as a mask
    return SDPBackend.FLASH_ATTENTION if q.shape[-1] == v.shape[-1] else SDPBackend.CUDNN_ATTENTION


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float | None = None, window: int | None = None
) -> Tensor:
    """Causal attention inside each document.

    q        [T, Hq, D]
    k, v     [T, Hk, D], [T, Hk, Dv]
    lengths                tokens of each document, summing to T
    window                 tokens a query sees, its own included; None: all before it
    gives    [T, Hq, Dv]
    """
    backend = backend_for(q, v, window)
    G = q.shape[1] // k.shape[1]
    outputs = []
    for qd, kd, vd in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        if len(qd) == 1:  # a lone token sees itself only, and cuDNN refuses it
            outputs.append(vd.repeat_interleave(G, dim=1))
            continue
        mask = None if window is None or len(qd) <= window else win_visible(len(qd), window, q.device)
        heads = [x.transpose(0, 1)[None] for x in (qd, kd, vd)]  # [1, heads, L, width]
        if backend == SDPBackend.EFFICIENT_ATTENTION:  # the only one here that refuses grouped heads
            heads[1:] = [x.repeat_interleave(G, dim=1) for x in heads[1:]]
        if backend is None:
            o = _sdpa(heads, mask, scale)
        else:
            with sdpa_kernel(backend):
                o = _sdpa(heads, mask, scale)
        outputs.append(o[0].transpose(0, 1))
    return torch.cat(outputs)


def _sdpa(heads: list[Tensor], mask: Tensor | None, scale: float | None) -> Tensor:
    grouped = heads[0].shape[1] != heads[1].shape[1]
    return F.scaled_dot_product_attention(
        *heads, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
