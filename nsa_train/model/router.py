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


FORCED = 100.0  # of logits: far above what a router gives


class Router(nn.Module):
    """Top-k of the scores plus a bias that only steers the choice (loss-free balancing, arXiv 2408.15664).

    forced  each expert is given as many tokens, in turn, for measurements of speed: nothing is learned so
    """

    bias: Tensor
    forced = False

    def __init__(self, width: int, moe: MoEConfig) -> None:
        super().__init__()
        self.config = moe
        self.weight = nn.Parameter(torch.empty(moe.experts, width))
        bias = torch.zeros(moe.experts, dtype=torch.float32, device="cpu")  # real, even in a model on the meta device
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Routing:
        """x [T, M]; bounds [N + 1] of its documents, so that packed ones are balanced as separate ones would be."""
        moe = self.config
        logits, bias = router_logits(x, self.weight), self.bias
        if self.forced:
            logits = logits + FORCED * in_turn(len(x), moe.experts, moe.top_k, x.device)
            bias = torch.zeros_like(bias)
        softmax = moe.router == "softmax"
        return Routing(*route(logits, bias, cu_seqlens, moe.top_k, softmax, moe.normalise, moe.routed_scale))


def in_turn(T: int, E: int, K: int, device: torch.device) -> Tensor:
    """[T, E] bool: K experts of each token, so that loads differ by one at most."""
    token, expert = torch.arange(T, device=device)[:, None], torch.arange(E, device=device)
    return (expert - K * token) % E < K


@torch.no_grad()
def update_bias(bias: Tensor, load: Tensor, rate: float) -> None:
    """Raise the bias of experts below the mean load and lower it above; kept centred so that it cannot drift."""
    bias += rate * torch.sign(load.mean() - load)
    bias -= bias.mean()
