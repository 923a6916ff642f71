"""FlashAttention-4 over packed documents.

The package flash-attn-4 (CuTe DSL) is optional and imported when it is first asked for. It compiles a kernel at its
first use, seconds each, and keeps it on disk with FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1.

    T tokens packed over all documents    Hq, Hk query and KV heads    D, Dv widths of keys and values

On Hopper its backward takes grouped heads only where D = Dv. Elsewhere keys and values are repeated to all query
heads, in the backward alone, and their gradients summed over each group. Gradients are added in the order in which
tiles finish: two runs may differ in rounding.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger("nsa_train")


class Kernels(NamedTuple):
    forward: Callable[..., Any]
    backward: Callable[..., Any]


@functools.cache
def kernels() -> Kernels | None:
    """The package's functions; None where it is missing or broken, or the GPU is no Hopper: untried on others."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return None
    try:
        from flash_attn.cute import flash_attn_varlen_func
        from flash_attn.cute.interface import _flash_attn_bwd  # the public function's repeats no heads
    except Exception as error:  # of any kind: a broken install must not stop a training
        if getattr(error, "name", None) not in ("flash_attn", "flash_attn.cute"):
            log.warning("FlashAttention-4 is not used, since it does not import: %s", error)
        return None
    return Kernels(flash_attn_varlen_func, _flash_attn_bwd)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, package: Kernels, earlier: int | None, options: dict[str, Any]
    ) -> Tensor:
        o, lse = package.forward(q, k, v, window_size=(earlier, None), return_lse=True, **options)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.package, ctx.earlier, ctx.options = package, earlier, options
        return o

    @staticmethod
    def backward(ctx, do: Tensor):
        q, k, v, o, lse = ctx.saved_tensors
        G = q.shape[1] // k.shape[1]
        repeated = G > 1 and q.shape[2] != v.shape[2]
        if repeated:
            k, v = (x.repeat_interleave(G, dim=1) for x in (k, v))
        dq, dk, dv = ctx.package.backward(q, k, v, o, do.contiguous(), lse, window_size_left=ctx.earlier, **ctx.options)
        if repeated:
            dk, dv = (x.unflatten(1, (-1, G)).sum(2) for x in (dk, dv))
        return dq, dk, dv, None, None, None


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, window: int | None, scale: float | None
) -> Tensor:
    """Causal attention inside each document.

    q        [T, Hq, D]    bf16 or fp16, contiguous; D and Dv multiples of 8
    k, v     [T, Hk, D], [T, Hk, Dv]
    bounds   [N + 1]       int32, of documents, 0 ... T
    longest                tokens of the longest document, or more: a bound
    window                 tokens a query sees, its own included; None: all before it
    scale                  None: D**-0.5
    gives    [T, Hq, Dv]

    RuntimeError where the package cannot be used.
    """
    package = kernels()
    if package is None:
        raise RuntimeError("backend flash4: flash-attn-4 does not import here, or the GPU is no Hopper")
    options = {
        "cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest,
        "softmax_scale": scale, "causal": True,
    }  # fmt: skip
    return _Attend.apply(q, k, v, package, None if window is None else window - 1, options)
