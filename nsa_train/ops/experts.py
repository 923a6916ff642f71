"""Routed experts without dropping: sort token copies by expert, multiply groups, put them back.

    T  tokens    M  width    E  experts    K  experts per token    R = T * K  rows    F  expert width

Both moves of rows are permutations, so their backward passes are gathers: no atomics, the same bits every time. On a
GPU what is no matrix product runs on the kernels of `experts_triton`; the forms in PyTorch stand here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_train.ops import experts_triton
from nsa_train.ops.tiles import on_kernels


def sum_rows(rows: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    """out[t] = sum over k of weights[t, k] rows[places[t, k]]: [R, M], [T, K], [T, K] -> [T, M]; None: weights of 1."""
    if on_kernels(rows):
        return experts_triton.sum_rows(rows, places, weights)
    parts = rows[places]
    return (parts if weights is None else parts * weights[..., None].to(rows.dtype)).sum(1)


def sum_rows_backward(grad: Tensor, rows: Tensor, order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows [R, M] and weights [T, K], from that of the sum [T, M]; order: `places` turned around, [R]."""
    if on_kernels(rows):
        return experts_triton.sum_rows_backward(grad.contiguous(), rows, order, weights)
    of_rows = grad[order // weights.shape[1]]
    d_weights = torch.empty_like(weights)
    d_weights.view(-1)[order] = (of_rows * rows).sum(-1).to(weights.dtype)
    return of_rows * weights.flatten()[order, None].to(rows.dtype), d_weights


class _Dispatch(torch.autograd.Function):
    """[T, M] -> [R, M], row r is token order[r] // K."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, places: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(places)
        return x[order // places.shape[1]]

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return sum_rows(grad.contiguous(), ctx.saved_tensors[0], None), None, None


class _Combine(torch.autograd.Function):
    """`sum_rows`: the rows of all experts back to their tokens, weighted."""

    @staticmethod
    def forward(ctx, rows: Tensor, weights: Tensor, order: Tensor, places: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows, weights, order)
        return sum_rows(rows, places, weights)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        rows, weights, order = ctx.saved_tensors
        return *sum_rows_backward(grad, rows, order, weights), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate_up)
        return experts_triton.swiglu(gate_up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        return experts_triton.swiglu_backward(ctx.saved_tensors[0], grad.contiguous())


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [R, 2 F] -> [R, F]."""
    if on_kernels(gate_up):
        return _SwiGLU.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def matmul_loop(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """rows[ends[e - 1] : ends[e]] @ weights[e] for each expert: [R, A] x [E, A, B] -> [R, B]. The plain form."""
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([part @ weights[e] for e, part in enumerate(rows.split(counts))])


def grouped_matmul(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`matmul_loop` as one kernel where torch has one: bf16 on a GPU."""
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        return F.grouped_mm(rows, weights, offs=ends)
    return matmul_loop(rows, weights, ends)


def routed_experts(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Weighted sum of each token's K SwiGLU experts.

    x        [T, M]
    experts  [T, K]        int64, chosen experts
    weights  [T, K]        fp32
    gate_up  [E, M, 2 * F]
    down     [E, F, M]
    gives    [T, M]        dtype of x
    """
    chosen, order = experts.flatten().sort(stable=True)
    every = torch.arange(gate_up.shape[0], device=x.device)
    ends = torch.searchsorted(chosen, every, right=True).to(torch.int32)  # like a count, without atomics or a sync
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=x.device)  # where the row of (token, choice) went
    places = places.view_as(experts)
    rows = _Dispatch.apply(x, order, places)
    rows = grouped_matmul(swiglu(grouped_matmul(rows, gate_up, ends)), down, ends)
    return _Combine.apply(rows, weights, order, places)
