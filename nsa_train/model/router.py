"""The router: which experts a token visits, with what weight, and how balanced that is. Computed in fp32."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nsa_train.config.schema import MoEConfig
from nsa_train.ops.routing import route, router_logits


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
        bias = torch.zeros(moe.experts, dtype=torch.float32, device="cpu")  # real, even in a model on the meta device
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Routing:
        """x [T, M]; bounds [N + 1] of its documents, so that packed ones are balanced as separate ones would be."""
        moe = self.config
        logits = router_logits(x, self.weight)
        softmax = moe.router == "softmax"
        return Routing(*route(logits, self.bias, cu_seqlens, moe.top_k, softmax, moe.normalise, moe.routed_scale))


@torch.no_grad()
def update_bias(bias: Tensor, load: Tensor, rate: float) -> None:
    """Raise the bias of experts below the mean load and lower it above; kept centred so that it cannot drift."""
    bias += rate * torch.sign(load.mean() - load)
    bias -= bias.mean()
