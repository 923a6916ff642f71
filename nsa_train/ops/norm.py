"""RMSNorm, alone or of a sum, in Triton on a GPU: a pass forward and a pass backward, no atomics.

PyTorch's kernel for the weight's gradient is slow; the sum before a norm would be a pass of its own, like the gradient
that joins behind it.

    R  rows    M  width
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nsa_train.ops.tiles import on_kernels, power_of_two

ELEMENTS = 2048  # of a program's tile, where a row is not longer
WIDEST = 8192  # row that fits into a program
PROGRAMS = 1024  # of the backward pass, at most: each keeps a sum of the weight's gradient


@triton.jit
def _norm_fwd(
    x,  # [R, M]
    y,  # [R, M], or None
    weight,  # [M]
    total,  # [R, M]  x + y, where there is y
    out,  # [R, M]
    scales,  # [R]  fp32: 1 / rms
    eps, R, M, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    at = row.to(tl.int64)[:, None] * M + column
    mask = (row[:, None] < R) & (column < M)
    a = tl.load(x + at, mask=mask, other=0.0)
    if y is not None:
        a = (a.to(tl.float32) + tl.load(y + at, mask=mask, other=0.0).to(tl.float32)).to(a.dtype)
        tl.store(total + at, a, mask=mask)
    a = a.to(tl.float32)
    scale = tl.rsqrt(tl.sum(a * a, 1) / M + eps)
    w = tl.load(weight + column, mask=column < M, other=0.0).to(tl.float32)
    tl.store(out + at, (a * scale[:, None] * w).to(out.dtype.element_ty), mask=mask)
    tl.store(scales + row, scale, mask=row < R)


@triton.jit
def _norm_bwd(
    grad,  # [R, M]
    d_total,  # [R, M]  what else the gradient of x takes, or None
    x,  # [R, M]
    weight,  # [M]
    scales,  # [R]  fp32
    d_x,  # [R, M]
    d_weights,  # [programs, M]  fp32
    tiles, R, M, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)[None, :]
    w = tl.load(weight + column, mask=column < M, other=0.0).to(tl.float32)
    d_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(tiles):
        row = (tl.program_id(0) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * M + column
        mask = (row[:, None] < R) & (column < M)
        scale = tl.load(scales + row, mask=row < R, other=0.0)[:, None]
        normed = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * scale
        d = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        d_weight += d * normed
        d *= w
        d = (d - normed * (tl.sum(d * normed, 1) / M)[:, None]) * scale
        if d_total is not None:
            d += tl.load(d_total + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_x + at, d.to(d_x.dtype.element_ty), mask=mask)
    at_program = d_weights + tl.program_id(0).to(tl.int64) * M + tl.arange(0, COLUMNS)
    tl.store(at_program, tl.sum(d_weight, 0), mask=tl.arange(0, COLUMNS) < M)


def _tile(width: int) -> dict[str, int]:
    """Rows and columns of a program's tile; 8 elements a thread, 16 bytes in bf16."""
    columns = power_of_two(width, 16)
    rows = max(1, ELEMENTS // columns)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": rows * columns // 256}


def norm_kernel(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x + y, its RMSNorm, 1 / rms of its rows [R] fp32) of x and y [R, M]; without y, of x."""
    R, M = x.shape
    total, out = x if y is None else torch.empty_like(x), torch.empty_like(x)
    scales, tile = torch.empty(R, dtype=torch.float32, device=x.device), _tile(M)
    _norm_fwd[(triton.cdiv(R, tile["ROWS"]),)](x, y, weight, total, out, scales, eps, R, M, **tile)
    return total, out, scales


def norm_backward_kernel(
    grad: Tensor, d_total: Tensor | None, x: Tensor, weight: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x [R, M] and weight [M] from that of the norm; that of x has d_total [R, M] added to it."""
    R, M = x.shape
    tile = _tile(M)
    tiles = max(1, triton.cdiv(triton.cdiv(R, tile["ROWS"]), PROGRAMS))
    programs = triton.cdiv(R, tile["ROWS"] * tiles)
    d_x, d_weights = torch.empty_like(x), torch.empty(programs, M, dtype=torch.float32, device=x.device)
    _norm_bwd[(programs,)](grad, d_total, x, weight, scales, d_x, d_weights, tiles, R, M, **tile)
    return d_x, d_weights.sum(0).to(weight.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        _, out, scales = norm_kernel(x, None, weight, eps)
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        return *norm_backward_kernel(grad.contiguous(), None, *ctx.saved_tensors), None


class _SumNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, out, scales = norm_kernel(x, y, weight, eps)
        ctx.save_for_backward(total, weight, scales)
        return total, out

    @staticmethod
    def backward(ctx, d_total: Tensor, grad: Tensor):
        d_x, d_weight = norm_backward_kernel(grad.contiguous(), d_total.contiguous(), *ctx.saved_tensors)
        return d_x, d_x, d_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight for each row of x [R, M]; weight [M]. Computed in fp32, rounded once."""
    if on_kernels(x) and x.shape[1] <= WIDEST:
        return _Norm.apply(x.contiguous(), weight, eps)
    return F.rms_norm(x, x.shape[1:], weight, eps)


def sum_and_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, rounded as ever, and its `rms_norm`."""
    if on_kernels(x) and x.shape[1] <= WIDEST:
        return _SumNorm.apply(x.contiguous(), y.contiguous(), weight, eps)
    return plain_sum_and_norm(x, y, weight, eps)


def plain_sum_and_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`sum_and_norm` by PyTorch's operations."""
    total = x + y
    return total, F.rms_norm(total, x.shape[1:], weight, eps)
