"""Softmax and cross-entropy of rows of logits, in Triton: a row's loss in one pass, its gradient in place in another.

PyTorch's operations would write and read the logits several times, in float32. The plain forms stand in `ops/loss.py`.

    T  tokens, a row each    V  vocabulary
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_train.ops.tiles import LOG2E, power_of_two

COLUMNS = 4096  # of a row that a program holds at once, at most
WARPS = 8
NO_LABEL = tl.constexpr(-100)


@triton.jit
def _row_losses(
    logits,  # [T, V]
    labels,  # [T]  int64
    losses, lse,  # [T]  fp32
    V, COLUMNS: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    row = logits + t * V
    top, total = float("-inf"), 0.0  # of 2^x
    for first in range(0, V, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        x = tl.load(row + column, mask=column < V, other=float("-inf")).to(tl.float32) * LOG2E
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(x - higher), 0)
        top = higher
    denominator = (top + tl.log2(total)) / LOG2E
    label = tl.load(labels + t)
    logit = tl.load(row + label, mask=(label >= 0) & (label < V), other=float("nan")).to(tl.float32)
    tl.store(lse + t, denominator)
    tl.store(losses + t, tl.where(label == NO_LABEL, 0.0, denominator - logit))


@triton.jit
def _row_gradients(
    logits,  # [T, V]  becomes its gradient
    labels,  # [T]  int64
    lse, grad,  # [T]  fp32
    V, COLUMNS: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    label = tl.load(labels + t)
    scale = tl.where(label == NO_LABEL, 0.0, tl.load(grad + t))
    at = logits + t * V + column
    p = tl.exp2((tl.load(at, mask=column < V, other=0.0).to(tl.float32) - tl.load(lse + t)) * LOG2E)
    d = (p - tl.where(column == label, 1.0, 0.0)) * scale
    tl.store(at, d.to(logits.dtype.element_ty), mask=column < V)


def row_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy, log-sum-exp), [T] fp32 each, of logits [T, V] and labels [T] int64.

    The loss is 0 where the label is -100, NaN where it is no other number of a column.
    """
    T, V = logits.shape
    losses, lse = (torch.empty(T, dtype=torch.float32, device=logits.device) for _ in range(2))
    columns = min(COLUMNS, power_of_two(V))
    _row_losses[(T,)](logits, labels, losses, lse, V, COLUMNS=columns, LOG2E=LOG2E, num_warps=WARPS)
    return losses, lse


def row_gradients(logits: Tensor, labels: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
    """Gradient [T, V] of the logits, in their place, from that of the losses [T] fp32."""
    T, V = logits.shape
    columns = min(COLUMNS, power_of_two(V))
    grid = T, triton.cdiv(V, columns)
    _row_gradients[grid](logits, labels, lse, grad, V, COLUMNS=columns, LOG2E=LOG2E, num_warps=WARPS)
    return logits
