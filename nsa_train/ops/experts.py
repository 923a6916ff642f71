"""Routed experts without dropping: sort token copies by expert, multiply groups, put them back.

    T  tokens    M  width    E  experts    K  experts per token    R = T * K  rows    F  expert width

Both moves of rows are permutations, and the backward pass of each is the other: no atomics, the same bits every time.
On a GPU what is no matrix product runs on the kernels of `experts_triton`; the forms in PyTorch stand here.
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


def spread_rows(x: Tensor, places: Tensor) -> Tensor:
    """out[places[t, k]] = x[t], every row of out once: [T, M], [T, K] -> [T * K, M]."""
    if on_kernels(x):
        return experts_triton.spread_rows(x, places)
    rows = x.new_empty(places.numel(), x.shape[1])
    return rows.index_put((places,), x[:, None].expand(-1, places.shape[1], -1))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return experts_triton.swiglu(gate_up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return experts_triton.swiglu_backward(ctx.saved_tensors[0], grad.contiguous())


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [R, 2 F] -> [R, F]."""
    if on_kernels(gate_up):
        return _SwiGLU.apply(gate_up)
    return plain_swiglu(gate_up)


def plain_swiglu(gate_up: Tensor) -> Tensor:
    """`swiglu` by PyTorch's operations."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def weighted_swiglu_backward(
    gate_up: Tensor, grad: Tensor, order: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate_up [R, 2 F] and weights [T, K] from that of weight * h, [R, F], where h = swiglu(gate_up) and
    the weight of row r is weights.flatten()[order[r]]; between them weight * h itself.
    """
    if on_kernels(gate_up):
        return experts_triton.weighted_swiglu_backward(gate_up, grad, order, weights)
    gate, up = gate_up.chunk(2, dim=-1)
    s = gate.sigmoid()
    h, weight = gate * s * up, weights.flatten()[order, None].to(gate.dtype)
    d_weights = torch.empty_like(weights)
    d_weights.view(-1)[order] = (grad * h).sum(-1).to(weights.dtype)
    d_h = weight * grad
    return torch.cat([d_h * up * s * (1 + gate * (1 - s)), d_h * gate * s], dim=-1), weight * h, d_weights


def matmul_loop(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """rows[ends[e - 1] : ends[e]] @ weights[e] for each expert: [R, A] x [E, A, B] -> [R, B]. The plain form."""
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([part @ weights[e] for e, part in enumerate(rows.split(counts))])


def grouped_matmul(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`matmul_loop` as one kernel where torch has one: bf16 on a GPU."""
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        return F.grouped_mm(rows, weights, offs=ends)
    return matmul_loop(rows, weights, ends)


def outer_loop(rows: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """Gradient of the weights of `matmul_loop`: [R, A], that of its result [R, B] -> [E, A, B]. The plain form."""
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.stack([a.T @ b for a, b in zip(rows.split(counts), grad.split(counts), strict=True)])


def grouped_outer(rows: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """`outer_loop` as one kernel where torch has one; an expert without rows gets zeros."""
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        return F.grouped_mm(rows.T, grad, offs=ends)
    return outer_loop(rows, grad, ends)


class _RoutedExperts(torch.autograd.Function):
    """Keeps x, the product with gate_up and the tables. What is cheap beside the products is made again: the rows of x,
    and SwiGLU of what is kept. Nor is the product with `down` needed: a weight's gradient is grad . (h down), which is
    also (grad down^T) . h, and the left factor is on the way to h's own gradient.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, order: Tensor, places: Tensor, ends: Tensor
    ) -> Tensor:
        product = grouped_matmul(spread_rows(x.contiguous(), places), gate_up, ends)
        ctx.save_for_backward(x, weights, gate_up, down, product, order, places, ends)
        return sum_rows(grouped_matmul(swiglu(product), down, ends), places, weights)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weights, gate_up, down, product, order, places, ends = ctx.saved_tensors
        rows = spread_rows(grad.contiguous(), places)
        d_h = grouped_matmul(rows, down.transpose(1, 2), ends)
        d_product, h, d_weights = weighted_swiglu_backward(product, d_h, order, weights)
        d_down = grouped_outer(h, rows, ends)
        del rows, d_h, h  # the largest tensors of a layer: gone before the next ones come
        d_gate_up = grouped_outer(spread_rows(x.contiguous(), places), d_product, ends)
        d_rows = grouped_matmul(d_product, gate_up.transpose(1, 2), ends)
        return sum_rows(d_rows, places, None), d_weights, d_gate_up, d_down, None, None, None


def routed_experts(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Weighted sum of each token's K SwiGLU experts.

    x        [T, M]
    experts  [T, K]        int64, chosen experts
    weights  [T, K]        fp32
    gate_up  [E, M, 2 * F]
    down     [E, F, M]
    gives    [T, M]        dtype of x
    """
    # A radix sort passes over its keys once for every 8 bits; 16 are enough for the number of an expert.
    chosen, order = experts.flatten().to(torch.int16).sort(stable=True)
    every = torch.arange(gate_up.shape[0], dtype=torch.int16, device=x.device)
    ends = torch.searchsorted(chosen, every, right=True, out_int32=True)  # like a count, without atomics or a sync
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=x.device)  # where the row of (token, choice) went
    return _RoutedExperts.apply(x, weights, gate_up, down, order, places.view_as(experts), ends)
