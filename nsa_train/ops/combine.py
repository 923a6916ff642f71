"""Gated sum of the branches (paper eq. 5): out[t, h] = sum over branches of gates[t, h, b] * o_b[t, h].

Reference: `reference.gated_sum`. Memory bound: each tensor is read or written once.

The gradient of a branch's output, gates_b * do, is never written. A branch's backward takes `do` itself, with
lse'_b = lse_b - log2(gates_b), which makes its probabilities P' = gates_b P, and delta_b = <do, o_b>, which is also the
gradient of the gate. So gates must not be negative (they are sigmoids); a gate of 0 gives lse' = +inf, P' = 0.

    T  tokens, packed    Hq  query heads    Dv  value width    R = T * Hq rows, a program owns ROWS of them
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_train.ops.tiles import power_of_two

ELEMENTS = 4096  # of a tile [ROWS, Dv]: 32 rows of 128, 2.9 to 3.1 TB/s on an H100
WARPS = 8  # with 4 the backward spills


@triton.jit
def _load(ptr, row, d, R, Dv: tl.constexpr):
    """fp32 [ROWS, DVP] of a tensor [R, Dv]."""
    mask = (row < R)[:, None] & (d < Dv)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * Dv + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _combine_fwd(
    gates,              # [R, 3]
    o_cmp, o_slc, o_win,  # [R, Dv]
    out,                # [R, Dv]
    R, Dv: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DVP)
    y = tl.zeros([ROWS, DVP], tl.float32)
    for b in tl.static_range(3):
        o = o_cmp if b == 0 else (o_slc if b == 1 else o_win)
        gate = tl.load(gates + row.to(tl.int64) * 3 + b, mask=row < R, other=0.0).to(tl.float32)
        y += gate[:, None] * _load(o, row, d, R, Dv)
    mask = (row < R)[:, None] & (d < Dv)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * Dv + d[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _combine_bwd(
    do,                         # [R, Dv]
    gates,                      # [R, 3]
    o_cmp, o_slc, o_win,        # [R, Dv]
    lse_cmp, lse_slc, lse_win,  # [R]     fp32, base 2
    dgates,                     # [R, 3]
    delta,                      # [3, R]  fp32
    lse_gated,                  # [3, R]  fp32
    R, Dv: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DVP)
    mine = row < R
    at = row.to(tl.int64)
    grad = _load(do, row, d, R, Dv)
    for b in tl.static_range(3):
        o = o_cmp if b == 0 else (o_slc if b == 1 else o_win)
        lse = lse_cmp if b == 0 else (lse_slc if b == 1 else lse_win)
        product = tl.sum(grad * _load(o, row, d, R, Dv), 1)
        gate = tl.load(gates + at * 3 + b, mask=mine, other=1.0).to(tl.float32)
        own = tl.load(lse + at, mask=mine, other=0.0)
        lowered = tl.where(gate > 0, own - tl.log2(tl.where(gate > 0, gate, 1.0)), float("inf"))
        tl.store(dgates + at * 3 + b, product.to(dgates.dtype.element_ty), mask=mine)
        tl.store(delta + at + b * R.to(tl.int64), product, mask=mine)
        tl.store(lse_gated + at + b * R.to(tl.int64), lowered, mask=mine)


def forward(gates: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor) -> Tensor:
    """Eq. 5.

    gates                [T, Hq, 3]   cmp, slc, win; not negative where gradients are wanted
    o_cmp, o_slc, o_win  [T, Hq, Dv]
    gives                [T, Hq, Dv]  dtype of o_cmp
    """
    out = torch.empty_like(o_cmp)
    R, size = _rows(o_cmp)
    _combine_fwd[(triton.cdiv(R, size["ROWS"]),)](gates, o_cmp, o_slc, o_win, out, R, **size, num_warps=WARPS)
    return out


def backward(
    do: Tensor, gates: Tensor, outputs: Sequence[Tensor], lses: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the gates, and what the branches' backward reads beside `do`.

    do                [T, Hq, Dv]
    gates             [T, Hq, 3]             not negative
    outputs           3 x [T, Hq, Dv]        of cmp, slc, win
    lses              3 x [T, Hq] fp32       base 2, +inf where a query sees no key
    gives dgates      [T, Hq, 3]             dtype of gates: <do, o_b>, also where the gate is 0
          delta       [3, T, Hq] fp32        the same numbers, one plane a branch
          lse_gated   [3, T, Hq] fp32        lse_b - log2(gates_b); +inf where the gate is 0 or lse_b is +inf
    """
    T, Hq, _ = do.shape
    dgates = torch.empty_like(gates)
    delta, lse_gated = (torch.empty(3, T, Hq, dtype=torch.float32, device=do.device) for _ in range(2))
    R, size = _rows(do)
    _combine_bwd[(triton.cdiv(R, size["ROWS"]),)](
        do, gates, *outputs, *lses, dgates, delta, lse_gated, R, **size, num_warps=WARPS
    )
    return dgates, delta, lse_gated


def _rows(o: Tensor) -> tuple[int, dict[str, int]]:
    T, Hq, Dv = o.shape
    DVP = power_of_two(Dv)
    return T * Hq, {"Dv": Dv, "DVP": DVP, "ROWS": max(1, ELEMENTS // DVP)}
