"""Compression phi beside its matrix products, in Triton: segments, blocks, and their gradients.

Each kernel passes over its rows once, in float32 inside, and writes zeros where there is no segment or block. The plain
forms stand in `ops/compress.py`, what lies where in `ops/segments.py`. No atomics: gradients are gathered too, the same
bits every time.

    T  tokens    Hk  KV heads    d  tokens of a segment    r  segments of a block    l = r d    D  width
    rows = T // d  room for segments, and for blocks    R = rows * Hk  rows of matrices: (segment or block, head)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_train.ops.segments import Segments

ROWS = 16  # of a program's tile: 8 elements a thread
COLUMNS = 64  # of a program's tile; divides the usual widths
WARPS = 4


@triton.jit
def _tile(R, D: tl.constexpr, Hk: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's tile of a matrix [R, D]: (rows int64, columns, which of both exist, row // Hk, row % Hk)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, row < R, column < D, row // Hk, row % Hk


@triton.jit
def _gather(
    x,  # [T, Hk, D]  strides: of_token, of_head, 1
    tokens,  # [rows, d]  int64
    is_segment,  # [rows]  bool
    parts,  # [R, d, D], or None
    sums,  # [R, D]  fp32, or None
    of_token, of_head, Hk: tl.constexpr, d: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program copies a segment of a head, and sums it."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    segment, head = row // Hk, row % Hk
    there = tl.load(is_segment + segment)
    x += tl.load(tokens + segment * d) * of_token + head * of_head
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, d, ROWS):
        j = first + tl.arange(0, ROWS)[:, None]
        mask = (j < d) & (column < D)[None, :]
        value = tl.load(x + j.to(tl.int64) * of_token + column[None, :], mask=mask & there, other=0.0)
        if parts is not None:
            tl.store(parts + (row * d + j) * D + column[None, :], value, mask=mask)
        total += tl.sum(value.to(tl.float32), 0)
    if sums is not None:
        tl.store(sums + row * D + column, total, mask=column < D)


@triton.jit
def _blocks(
    z,  # [r, R, D]  each segment times slice i of W1, or None
    bias,  # [D], or None
    sums,  # [R, D]  fp32, of each segment, or None
    first_segment, used,  # [rows]  int64, bool
    pre, hidden,  # [R, D], or None
    y,  # [R, D]
    R, Hk: tl.constexpr, D: tl.constexpr, d: tl.constexpr, r: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """pre: a block's products and the bias added up; hidden: silu(pre); y: the mean of its tokens, without sums pre."""
    row, column, exists, inside, block, head = _tile(R, D, Hk, ROWS, COLUMNS)
    at = row * D + column
    there = tl.load(used + block, mask=exists, other=False)
    segment = tl.load(first_segment + block, mask=exists, other=0) * Hk + head
    mask = there & inside
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if z is not None:
        for i in range(r):
            total += tl.load(z + (i * (R + Hk) + segment) * D + column, mask=mask, other=0.0).to(tl.float32)
        total = tl.where(there, total + tl.load(bias + column, mask=inside, other=0.0).to(tl.float32), 0.0)
    if hidden is not None:
        tl.store(pre + at, total.to(pre.dtype.element_ty), mask=exists & inside)
        tl.store(hidden + at, (total * tl.sigmoid(total)).to(hidden.dtype.element_ty), mask=exists & inside)
    if sums is not None:
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for i in range(r):
            total += tl.load(sums + (segment + i * Hk) * D + column, mask=mask, other=0.0)
        total /= r * d
    tl.store(y + at, total.to(y.dtype.element_ty), mask=exists & inside)


@triton.jit
def _spread(
    grad,  # [R, D]  of each block's linear map, or of its silu
    pre,  # [R, D], or None without silu
    dy,  # [R, D], or None
    block, in_block,  # [rows, r]  int64, bool
    used,  # [rows]  bool
    dz,  # [r, R, D]
    dy_used,  # [R, D], or None: dy with zeros where there is no block
    R, Hk: tl.constexpr, D: tl.constexpr, r: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dz[i]: gradient of the linear map of the block that has the segment as its i-th."""
    row, column, exists, inside, segment, head = _tile(R, D, Hk, ROWS, COLUMNS)
    at = row * D + column
    for i in range(r):
        there = tl.load(in_block + segment * r + i, mask=exists, other=False)
        source = (tl.load(block + segment * r + i, mask=exists, other=0) * Hk + head) * D + column
        d = tl.load(grad + source, mask=there & inside, other=0.0).to(tl.float32)
        if pre is not None:
            h = tl.load(pre + source, mask=there & inside, other=0.0).to(tl.float32)
            s = tl.sigmoid(h)
            d *= s * (1.0 + h * (1.0 - s))
        tl.store(dz + (i * R + row) * D + column, d.to(dz.dtype.element_ty), mask=exists & inside)
    if dy_used is not None:
        there = tl.load(used + segment, mask=exists, other=False)
        tl.store(dy_used + at, tl.load(dy + at, mask=there & inside, other=0.0), mask=exists & inside)


@triton.jit
def _scatter(
    dparts,  # [r, R, d, D]  gradients of the segments by slice of W1, or None
    dy,  # [R, D]  of the means, or None
    place, in_segment,  # [T]  int64, bool
    block, in_block,  # [rows, r]  int64, bool
    dx,  # [T, Hk, D]
    T, R, Hk: tl.constexpr, D: tl.constexpr, d: tl.constexpr, r: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """A token takes the gradient of its place in its segment."""
    row, column, exists, inside, token, head = _tile(T * Hk, D, Hk, ROWS, COLUMNS)
    there = tl.load(in_segment + token, mask=exists, other=False)
    mask = there & inside
    own = tl.load(place + token, mask=exists, other=0)
    segment, j = own // d, own % d
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if dy is not None:
        for i in range(r):
            covered = tl.load(in_block + segment * r + i, mask=there, other=False)
            source = tl.load(block + segment * r + i, mask=there, other=0) * Hk + head
            total += tl.load(dy + source * D + column, mask=covered & inside, other=0.0).to(tl.float32)
        total /= r * d
    if dparts is not None:
        for i in range(r):
            source = (i * R + segment * Hk + head) * d + j
            total += tl.load(dparts + source * D + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx + row * D + column, total.to(dx.dtype.element_ty), mask=exists & inside)


def gather(x: Tensor, segments: Segments, copies: bool, sums: bool) -> tuple[Tensor | None, Tensor | None]:
    """Tokens of each segment and their sum: [T, Hk, D] -> [R, d * D], [R, D] fp32; None where not wanted."""
    Hk, D = x.shape[1:]
    rows, d = segments.tokens.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    parts = x.new_empty(rows * Hk, d * D) if copies else None
    total = x.new_empty(rows * Hk, D, dtype=torch.float32) if sums else None
    _gather[rows * Hk, triton.cdiv(D, COLUMNS)](
        x, segments.tokens, segments.is_segment, parts, total, x.stride(0), x.stride(1),
        Hk=Hk, d=d, D=D, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return parts, total


def blocks(
    z: Tensor | None, bias: Tensor | None, sums: Tensor | None, y: Tensor, segments: Segments
) -> tuple[Tensor | None, Tensor | None]:
    """Writes y [rows, Hk, D]: the blocks' means, without `sums` [R, D] their linear map.

    z     [r, R, D]  products of segments with the slices of W1, whose sums over a block are the linear map
    bias  [D]
    gives pre and hidden [R, D], the linear map and its silu, where z and sums are there, else None
    """
    (rows, Hk, D), both = y.shape, z is not None and sums is not None
    R = rows * Hk
    pre, hidden = (y.new_empty(R, D) if both else None for _ in range(2))
    _blocks[_grid(R, D)](
        z, bias, sums, segments.first_segment, segments.used, pre, hidden, y,
        R, Hk=Hk, D=D, d=segments.stride, r=segments.count, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return pre, hidden


def spread(grad: Tensor, pre: Tensor | None, dy: Tensor, segments: Segments) -> tuple[Tensor, Tensor | None]:
    """Gradient of z [r, R, D] from that of the blocks' linear map, or with `pre` of its silu; rows [R, D].

    With `pre` also dy [rows, Hk, D] as [R, D], zeros where there is no block.
    """
    (Hk, D), R = dy.shape[1:], len(grad)
    dz = grad.new_empty(segments.count, R, D)
    dy_used = None if pre is None else torch.empty_like(grad)
    _spread[_grid(R, D)](
        grad, pre, dy, segments.block, segments.in_block, segments.used, dz, dy_used,
        R, Hk=Hk, D=D, r=segments.count, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return dz, dy_used


def scatter(dparts: Tensor | None, dy: Tensor | None, dx: Tensor, segments: Segments) -> Tensor:
    """Writes dx [T, Hk, D] from dparts [r, R, d * D] and from the gradient of the blocks' means, [rows, Hk, D]."""
    T, Hk, D = dx.shape
    _scatter[_grid(T * Hk, D)](
        dparts, dy, segments.place, segments.in_segment, segments.block, segments.in_block, dx,
        T, len(segments.used) * Hk, Hk=Hk, D=D, d=segments.stride, r=segments.count, ROWS=ROWS, COLUMNS=COLUMNS,
        num_warps=WARPS,
    )  # fmt: skip
    return dx


def _grid(R: int, D: int) -> tuple[int, int]:
    return triton.cdiv(R, ROWS), triton.cdiv(D, COLUMNS)


def _slices(w1: Tensor, r: int) -> Tensor:
    """W1 [D, l * D] as [r, D, d * D], not copied."""
    return w1.view(len(w1), r, -1).transpose(0, 1)


class _Phi(torch.autograd.Function):
    """Launches a tensor: mlp 4 forward and 7 backward, linear 3 and 5, mean 2 and 1; products take strides as they are.

    Slices of W1 are the batch of one product, so neither they nor their gradient is ever copied.
    """

    @staticmethod
    def forward(ctx, x, segments, w1, bias, w2):
        r, D = segments.count, x.shape[2]
        parts, sums = gather(x, segments, copies=w1 is not None, sums=w1 is None or w2 is not None)
        z = None if parts is None else torch.bmm(parts.expand(r, -1, -1), _slices(w1, r).transpose(1, 2))
        y = x.new_empty(len(segments.used), x.shape[1], D)
        pre, hidden = blocks(z, bias, sums, y, segments)
        if w2 is not None:
            y.view(-1, D).addmm_(hidden, w2.t())
        ctx.save_for_backward(parts, pre, hidden, w1, w2)
        ctx.segments, ctx.shape = segments, x.shape
        return y

    @staticmethod
    def backward(ctx, dy):
        parts, pre, hidden, w1, w2 = ctx.saved_tensors
        segments, r, dy = ctx.segments, ctx.segments.count, dy.contiguous()
        dx = dy.new_empty(ctx.shape)
        if w1 is None:
            return scatter(None, dy, dx, segments), None, None, None, None
        grad = dy.view(-1, dy.shape[2])
        dz, dy_used = spread(grad if w2 is None else grad @ w2, pre, dy, segments)
        dw1 = torch.empty_like(w1)
        torch.bmm(dz.transpose(1, 2), parts.expand(r, -1, -1), out=_slices(dw1, r))
        dw2 = None if dy_used is None else dy_used.t() @ hidden
        scatter(torch.bmm(dz, _slices(w1, r)), None if w2 is None else dy, dx, segments)
        return dx, None, dw1, dz[0].sum(0), dw2  # z[0] reaches each block once


def compress(x: Tensor, segments: Segments, *parameters: Tensor) -> Tensor:
    """`ops.compress.compress` of the kind that has these parameters: mlp 3, linear 2, mean none."""
    return _Phi.apply(x, segments, *parameters, *[None] * (3 - len(parameters)))
