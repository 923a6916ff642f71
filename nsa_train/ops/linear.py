"""Several linear layers of one input as one matrix product: narrow ones by themselves leave most of a GPU idle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class _Linears(torch.autograd.Function):
    """The weights are put side by side again in the backward pass: keeping them so would cost their memory."""

    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return tuple((x @ torch.cat(weights).t()).split([len(w) for w in weights], dim=1))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, *weights = ctx.saved_tensors
        grad = torch.cat(grads, dim=1)
        return grad @ torch.cat(weights), *(grad.t() @ x).split([len(w) for w in weights])


def linears(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """x [T, M] times each of the weights [N_i, M]: views [T, N_i] of one result."""
    return _Linears.apply(x, *weights)
