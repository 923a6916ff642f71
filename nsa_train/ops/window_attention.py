"""The window branch by itself, as the ablation `window` uses it: causal attention over each query's last tokens.

    from nsa_train.ops.window_attention import window_attention

It runs on the kernels of the whole op; the plain form is `dense_attention` with a window.
"""

from __future__ import annotations

from dataclasses import astuple

import torch
from torch import Tensor

from nsa_train.ops.documents import Documents
from nsa_train.ops.nsa_triton import part
from nsa_train.ops.reference import NSASpec


@torch.library.custom_op("nsa_train::window_forward", mutates_args=())
def _window_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, spec: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    sizes = NSASpec(*spec)
    documents = Documents(cu_seqlens, q.shape[0], sizes)
    return part("window", q, k, v, sizes).forward(q, k, v, documents, sizes, scale)


@_window_forward.register_fake
def _(q, k, v, cu_seqlens, spec, scale):
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("nsa_train::window_backward", mutates_args=())
def _window_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu_seqlens: Tensor, spec: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sizes = NSASpec(*spec)
    documents = Documents(cu_seqlens, q.shape[0], sizes)
    delta, dq = (do.float() * o.float()).sum(-1), torch.empty_like(q)
    dk, dv = part("window", q, k, v, sizes).backward(
        q, k, v, do, lse, delta, documents, sizes, scale, dq, accumulate=False
    )
    return dq, dk, dv


@_window_backward.register_fake
def _(do, q, k, v, o, lse, cu_seqlens, spec, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, *sizes = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.sizes = sizes
    ctx.set_materialize_grads(False)  # the log-sum-exp has no gradient


def _backward(ctx, do, _lse):
    return *_window_backward(do.contiguous(), *ctx.saved_tensors, *ctx.sizes), None, None, None


_window_forward.register_autograd(_backward, setup_context=_save)


def window_attention(q: Tensor, k: Tensor, v: Tensor, spec: NSASpec, cu_seqlens: Tensor) -> Tensor:
    """Each query attends to the last `spec.window` tokens of its document, its own included.

    q           [T, Hq, D]    bf16, fp16 or fp32, on a GPU or in Triton's interpreter
    k, v        [T, Hk, D], [T, Hk, Dv]
    cu_seqlens  [N + 1]       int32, document bounds 0 ... T
    gives       [T, Hq, Dv]   dtype of q
    """
    q, k, v = (x.contiguous() for x in (q, k, v))
    return _window_forward(q, k, v, cu_seqlens, list(astuple(spec)), q.shape[-1] ** -0.5)[0]
