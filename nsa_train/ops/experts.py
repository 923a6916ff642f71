"""Routed experts without dropping: sort token copies by expert, multiply groups, put them back.

    T tokens    M width    E experts    K experts per token    F expert width

Both moves of rows are permutations, so their backward passes are gathers: no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class _Dispatch(torch.autograd.Function):
    """[T, M] -> [T * K, M], row r is token order[r] // K."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, K: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(order)
        ctx.K = K
        return x[order // K]

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (order,) = ctx.saved_tensors
        back = torch.empty_like(grad)
        back[order] = grad
        return back.view(-1, ctx.K, grad.shape[-1]).sum(1), None, None


class _Restore(torch.autograd.Function):
    """[T * K, M] sorted by expert -> the same rows in the order of (token, choice)."""

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(order)
        back = torch.empty_like(rows)
        back[order] = rows
        return back

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (order,) = ctx.saved_tensors
        return grad[order], None


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
    T, K = experts.shape
    chosen, order = experts.flatten().sort(stable=True)
    every = torch.arange(gate_up.shape[0], device=x.device)
    ends = torch.searchsorted(chosen, every, right=True).to(torch.int32)  # like a count, without atomics or a sync
    rows = _Dispatch.apply(x, order, K)
    gate, up = grouped_matmul(rows, gate_up, ends).chunk(2, dim=-1)
    rows = grouped_matmul(F.silu(gate) * up, down, ends)
    by_choice = _Restore.apply(rows, order).view(T, K, -1)
    return (by_choice * weights[..., None].to(x.dtype)).sum(1)
