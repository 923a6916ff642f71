"""The router: which experts a token visits, with what weight, and how balanced that is. Computed in fp32."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsa_train.config.schema import MoEConfig

SCORES = {"sigmoid": torch.sigmoid, "softmax": lambda logits: logits.softmax(-1)}


class Routing(NamedTuple):
    """experts [T, K] int64, weights [T, K] fp32, load [E] tokens per expert, balance: auxiliary loss, a sum over T."""

    experts: Tensor
    weights: Tensor
    load: Tensor
    balance: Tensor


class Router(nn.Module):
    """Top-k of the scores plus a bias that only steers the choice (loss-free balancing, arXiv 2408.15664)."""

    bias: Tensor

    def __init__(self, width: int, moe: MoEConfig) -> None:
        super().__init__()
        self.config = moe
        self.weight = nn.Parameter(torch.empty(moe.experts, width))
        self.register_buffer("bias", torch.zeros(moe.experts, dtype=torch.float32))

    def forward(self, x: Tensor, members: Tensor) -> Routing:
        """x [T, M]; members [N, T] of `Packing`, so that packed documents are balanced as separate ones would be."""
        moe = self.config
        scores = SCORES[moe.router](F.linear(x.float(), self.weight.float()))  # [T, E]
        experts = (scores + self.bias).topk(moe.top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
        if moe.normalise:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
        chosen = torch.zeros_like(scores).scatter_(-1, experts, 1.0)  # [T, E]
        return Routing(experts, weights * moe.routed_scale, chosen.sum(0), self._balance(scores, chosen, members))

    def _balance(self, scores: Tensor, chosen: Tensor, members: Tensor) -> Tensor:
        """Sequence-wise balance loss (arXiv 2412.19437, eq. 17-20) of each document, times its tokens, summed."""
        E, K = self.config.experts, self.config.top_k
        share = scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)
        members = members.to(scores.dtype)
        f, p = members @ chosen, members @ share  # [N, E], sums over the tokens of a document
        return (E / K) * ((f * p).sum(-1) / members.sum(-1).clamp(min=1)).sum()


@torch.no_grad()
def update_bias(bias: Tensor, load: Tensor, rate: float) -> None:
    """Raise the bias of experts below the mean load and lower it above; kept centred so that it cannot drift."""
    bias += rate * torch.sign(load.mean() - load)
    bias -= bias.mean()
