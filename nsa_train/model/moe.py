"""Mixture of experts: shared experts that every token visits, and routed ones, without dropping tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsa_train.config.schema import MoEConfig
from nsa_train.model.layers import SwiGLU
from nsa_train.model.router import Router, Routing
from nsa_train.ops.experts import routed_experts


class MoE(nn.Module):
    """The router is called by the layer, outside of recomputation: routing is saved, never decided twice."""

    def __init__(self, width: int, moe: MoEConfig) -> None:
        super().__init__()
        self.router = Router(width, moe)
        self.gate_up = nn.Parameter(torch.empty(moe.experts, width, 2 * moe.expert_width))
        self.down = nn.Parameter(torch.empty(moe.experts, moe.expert_width, width))
        self.shared = SwiGLU(width, moe.shared * moe.expert_width) if moe.shared else None

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """[T, M] -> [T, M]"""
        out = routed_experts(x, routing.experts, routing.weights, self.gate_up, self.down)
        return out if self.shared is None else out + self.shared(x)
