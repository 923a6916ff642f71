"""Routing of tokens to experts, in fp32: which experts a token visits, with what weight, and how balanced that is.

    T  tokens    N  documents    M  width    E  experts    K  experts of a token

On a GPU the logits are one matrix product and the rest runs on the kernels of `routing_triton`, one in each direction
and a small sum; the forms in PyTorch stand here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_train.ops import routing_triton
from nsa_train.ops.tiles import on_kernels

SMALLEST = routing_triton.SMALLEST.value


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32 of bf16 matrices on a GPU: their products are exact in fp32, where they are summed."""
    return torch.mm(a, b, out_dtype=torch.float32)


class _Logits(torch.autograd.Function):
    """The fp32 gradient is split into two bf16 numbers, 16 bits of its mantissa, and both run through one product; what
    comes out is rounded to bf16, 8 bits."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.T)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        (T, E), M = grad.shape, x.shape[1]
        parts = x.new_empty(T, 2, E)
        parts[:, 0] = grad
        parts[:, 1] = grad - parts[:, 0]
        halves = parts.view(T, 2 * E)
        return halves @ weight.repeat(2, 1), product(halves.T, x).view(2, E, M).sum(0).to(weight.dtype)


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T: [T, M], [E, M] -> [T, E] fp32; of bf16 on a GPU without a copy in fp32."""
    if x.dtype == weight.dtype == torch.bfloat16 and on_kernels(x):
        return _Logits.apply(x, weight)
    return F.linear(x.float(), weight.float())


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, logits: Tensor, bias: Tensor, cu_seqlens: Tensor, top_k: int, softmax: bool, normalise: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.rules = softmax, normalise, scale
        logits = logits.contiguous()
        experts, weights, counts, losses = routing_triton.route(logits, bias, cu_seqlens, top_k, *ctx.rules)
        ctx.save_for_backward(logits, experts, counts, cu_seqlens)
        load = counts.sum(0)
        ctx.mark_non_differentiable(experts, load)
        return experts, weights, load, losses.sum()

    @staticmethod
    def backward(ctx, _experts: None, d_weights: Tensor, _load: None, d_balance: Tensor):
        logits, experts, counts, cu_seqlens = ctx.saved_tensors
        d_logits = routing_triton.route_backward(
            logits, experts, counts, cu_seqlens, d_weights.contiguous(), d_balance, *ctx.rules
        )
        return d_logits, None, None, None, None, None, None


def route(
    logits: Tensor, bias: Tensor, cu_seqlens: Tensor, top_k: int, softmax: bool, normalise: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each token's K experts with the highest score plus bias, by falling sum, ties to the lower index.

    logits      [T, E]   fp32; the scores are their softmax or their sigmoid
    bias        [E]      fp32; only steers the choice
    cu_seqlens  [N + 1]  int32, bounds of the documents, 0 ... T
    gives experts [T, K] int64, and in fp32
          weights [T, K] the scores times `scale`, with `normalise` divided by their sum
          load    [E]    tokens of each expert
          balance []     the sequence-wise balance loss (arXiv 2412.19437, eq. 17-20) of each document, times its
                         tokens, summed
    """
    T, E = logits.shape
    if on_kernels(logits) and E <= routing_triton.MOST_EXPERTS and top_k <= routing_triton.MOST_CHOSEN:
        return _Route.apply(logits, bias, cu_seqlens, top_k, softmax, normalise, scale)
    scores = logits.softmax(-1) if softmax else logits.sigmoid()
    experts = (scores.detach() + bias).sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    weights = scores.gather(-1, experts)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=SMALLEST)
    chosen = torch.zeros_like(scores).scatter_(-1, experts, 1.0)  # [T, E]
    share = scores / scores.sum(-1, keepdim=True).clamp(min=SMALLEST)
    token, begin, end = torch.arange(T, device=logits.device), cu_seqlens[:-1, None], cu_seqlens[1:, None]
    members = ((token >= begin) & (token < end)).to(scores.dtype)  # [N, T]
    f, p = members @ chosen, members @ share  # [N, E], sums over the tokens of a document
    balance = (E / top_k) * ((f * p).sum(-1) / members.sum(-1).clamp(min=1)).sum()
    return experts, weights * scale, chosen.sum(0), balance
