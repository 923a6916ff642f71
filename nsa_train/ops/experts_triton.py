"""Routed experts beside their matrix products, in Triton: SwiGLU, a token's sum over its experts, and the gradients.

Each is one pass over its rows, in float32 inside; PyTorch's own operations would write and read every row several
times. The plain forms stand in `ops/experts.py`. No atomics: the same bits every time.

    T  tokens    K  experts of a token    R = T * K  rows, sorted by expert    M  width    F  expert width
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_train.ops.tiles import power_of_two

ELEMENTS = 2048  # of a program's tile: 16 a thread
WIDEST = 1024  # columns in it, at most
NARROWEST = 64  # columns in it where they divide the width, so that none is masked
WARPS = 4


@triton.jit
def _gate_up(gate_up, R, F, part, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's tile of gate_up [R, 2 F]: (rows, columns of F, which of them exist, gate, up), the last two fp32.

    part: which COLUMNS of the F, counted from 0.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = part * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < R) & (column < F)
    gate = tl.load(gate_up + row * (2 * F) + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * F) + F + column, mask=mask, other=0.0).to(tl.float32)
    return row, column, mask, gate, up


@triton.jit
def _swiglu_fwd(
    gate_up,  # [R, 2 F]
    out,  # [R, F]
    R, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, mask, gate, up = _gate_up(gate_up, R, F, tl.program_id(1), ROWS, COLUMNS)
    y = gate * tl.sigmoid(gate) * up
    tl.store(out + row * F + column, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_bwd(
    gate_up,  # [R, 2 F]
    grad,  # [R, F]
    out,  # [R, 2 F]
    R, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, mask, gate, up = _gate_up(gate_up, R, F, tl.program_id(1), ROWS, COLUMNS)
    d = tl.load(grad + row * F + column, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    d_gate = d * up * s * (1.0 + gate * (1.0 - s))
    tl.store(out + row * (2 * F) + column, d_gate.to(out.dtype.element_ty), mask=mask)
    tl.store(out + row * (2 * F) + F + column, (d * gate * s).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _weighted_swiglu_bwd(
    gate_up,  # [R, 2 F]
    grad,  # [R, F]
    order,  # [R]  int64
    weights,  # [T, K]  fp32
    d_gate_up,  # [R, 2 F]
    weighted,  # [R, F]
    d_weights,  # [T, K]  fp32
    R, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = own < R
    choice = tl.load(order + own, mask=there, other=0)
    weight = tl.load(weights + choice, mask=there, other=0.0)[:, None]
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for part in range(tl.cdiv(F, COLUMNS)):
        row, column, mask, gate, up = _gate_up(gate_up, R, F, part, ROWS, COLUMNS)
        d = tl.load(grad + row * F + column, mask=mask, other=0.0).to(tl.float32)
        s = tl.sigmoid(gate)
        h = gate * s * up
        product += d * h
        tl.store(weighted + row * F + column, (weight * h).to(weighted.dtype.element_ty), mask=mask)
        d *= weight
        d_gate = d * up * s * (1.0 + gate * (1.0 - s))
        tl.store(d_gate_up + row * (2 * F) + column, d_gate.to(d_gate_up.dtype.element_ty), mask=mask)
        tl.store(d_gate_up + row * (2 * F) + F + column, (d * gate * s).to(d_gate_up.dtype.element_ty), mask=mask)
    tl.store(d_weights + choice, tl.sum(product, 1), mask=there)


@triton.jit
def _token_tile(T, M, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's tile of [T, M]: tokens, which of them exist, columns, and which elements exist."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    there = token < T
    return token, there, column, there[:, None] & (column < M)


@triton.jit
def _sum_rows(
    rows,  # [R, M]
    places,  # [T, K]  int64
    weights,  # [T, K]  fp32, or None
    out,  # [T, M]
    T, M, K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token, there, column, mask = _token_tile(T, M, TOKENS, COLUMNS)
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for k in tl.static_range(K):
        place = tl.load(places + token * K + k, mask=there, other=0)
        x = tl.load(rows + place[:, None] * M + column, mask=mask, other=0.0).to(tl.float32)
        if weights is not None:
            x *= tl.load(weights + token * K + k, mask=there, other=0.0)[:, None]
        total += x
    tl.store(out + token.to(tl.int64)[:, None] * M + column, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _spread_rows(
    x,  # [T, M]
    places,  # [T, K]  int64
    out,  # [R, M]
    T, M, K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token, there, column, mask = _token_tile(T, M, TOKENS, COLUMNS)
    row = tl.load(x + token.to(tl.int64)[:, None] * M + column, mask=mask, other=0.0)
    for k in tl.static_range(K):
        place = tl.load(places + token * K + k, mask=there, other=0)
        tl.store(out + place[:, None] * M + column, row, mask=mask)


def _tile(width: int) -> tuple[int, int]:
    """Rows and columns of a program's tile."""
    columns = math.gcd(width, WIDEST)
    if columns < NARROWEST:
        columns = min(WIDEST, power_of_two(width, 16))
    return ELEMENTS // columns, columns


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [R, 2 F] -> [R, F]."""
    R, F = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(R, F)
    rows, columns = _tile(F)
    grid = triton.cdiv(R, rows), triton.cdiv(F, columns)
    _swiglu_fwd[grid](gate_up, out, R, F, ROWS=rows, COLUMNS=columns, num_warps=WARPS)
    return out


def swiglu_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    """Gradient of gate_up [R, 2 F], from that of the result [R, F]."""
    R, F = grad.shape
    out = torch.empty_like(gate_up)
    rows, columns = _tile(F)
    grid = triton.cdiv(R, rows), triton.cdiv(F, columns)
    _swiglu_bwd[grid](gate_up, grad, out, R, F, ROWS=rows, COLUMNS=columns, num_warps=WARPS)
    return out


def weighted_swiglu_backward(
    gate_up: Tensor, grad: Tensor, order: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of gate_up [R, 2 F], weight * h [R, F], and the gradient of weights [T, K]: see the plain form."""
    R, F = grad.shape
    d_gate_up, weighted, d_weights = torch.empty_like(gate_up), torch.empty_like(grad), torch.empty_like(weights)
    rows, columns = _tile(F)
    rows //= 2  # 8 elements a thread: this kernel holds twice as many values of each as the others
    _weighted_swiglu_bwd[(triton.cdiv(R, rows),)](
        gate_up, grad, order, weights, d_gate_up, weighted, d_weights, R, F, ROWS=rows, COLUMNS=columns, num_warps=WARPS
    )
    return d_gate_up, weighted, d_weights


def sum_rows(rows: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    """out[t] = sum over k of weights[t, k] rows[places[t, k]]: [R, M], [T, K], [T, K] -> [T, M]; None: weights of 1."""
    (T, K), M = places.shape, rows.shape[1]
    out = rows.new_empty(T, M)
    tokens, columns = _tile(M)
    grid = triton.cdiv(T, tokens), triton.cdiv(M, columns)
    _sum_rows[grid](rows, places, weights, out, T, M, K=K, TOKENS=tokens, COLUMNS=columns, num_warps=WARPS)
    return out


def spread_rows(x: Tensor, places: Tensor) -> Tensor:
    """out[places[t, k]] = x[t]: [T, M], [T, K] -> [T * K, M]."""
    (T, K), M = places.shape, x.shape[1]
    out = x.new_empty(T * K, M)
    tokens, columns = _tile(M)
    grid = triton.cdiv(T, tokens), triton.cdiv(M, columns)
    _spread_rows[grid](x, places, out, T, M, K=K, TOKENS=tokens, COLUMNS=columns, num_warps=WARPS)
    return out
