"""Key and value projections of the attention branches, and phi, which turns each block of tokens into a key or value.

A phi maps packed [T, Hk, width] to [T // cmp_stride, Hk, width], document after document, zeros behind the last block.
It starts as mean pooling: `STARTS` makes the initial values that this takes.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from nsa_train.config.schema import AttentionConfig, ModelConfig
from nsa_train.ops.compress import compress
from nsa_train.ops.reference import NSASpec
from nsa_train.ops.segments import Segments

# Whose K/V a branch reads. `full` and `slc` carry the same name, so that the arms share initial values.
OWN_KV = {"full": "token", "slc": "token", "cmp": "cmp", "win": "win"}


def spec_of(attention: AttentionConfig) -> NSASpec:
    return NSASpec(
        attention.cmp_block, attention.cmp_stride, attention.slc_block, attention.slc_count,
        attention.slc_init, attention.slc_local, attention.window,
    )  # fmt: skip


def kv_name(branch: str, attention: AttentionConfig) -> str:
    return "token" if attention.shared_kv else OWN_KV[branch]


class KeyValue(nn.Module):
    """Weights of one K and one V projection; `Attention.project` multiplies those of all branches at once."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.k = nn.Linear(model.width, model.kv_heads * model.key_dim, bias=False)
        self.v = nn.Linear(model.width, model.kv_heads * model.value_dim, bias=False)


class MeanPhi(nn.Module):
    def __init__(self, block: int, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        return compress(x, segments, "mean")


class MLPPhi(nn.Module):
    # w1 starts at random: with w2 = 0 it does not show, and it is what w2 learns to read
    STARTS: ClassVar = {"bias": torch.zeros, "w2": torch.zeros}

    def __init__(self, block: int, dim: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(dim, block * dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.w2 = nn.Parameter(torch.empty(dim, dim))

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        return compress(x, segments, "mlp", self.w1, self.bias, self.w2)


def _mean(shape: torch.Size) -> Tensor:
    """The matrix [dim, block * dim] that takes the mean of a block's rows."""
    dim, inputs = shape
    return torch.eye(dim).repeat(1, inputs // dim) * (dim / inputs)


class LinearPhi(nn.Module):
    STARTS: ClassVar = {"weight": _mean, "bias": torch.zeros}

    def __init__(self, block: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, block * dim))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        return compress(x, segments, "linear", self.weight, self.bias)


class GatedPoolPhi(nn.Module):
    STARTS: ClassVar = {"weight": torch.zeros, "bias": torch.zeros}

    def __init__(self, block: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(block))

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        return compress(x, segments, "gated_pool", self.weight, self.bias)


PHI: dict[str, type[nn.Module]] = {"mlp": MLPPhi, "linear": LinearPhi, "gated_pool": GatedPoolPhi, "mean": MeanPhi}
