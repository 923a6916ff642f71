"""The small parts of a layer: RMSNorm, rotary positions, SwiGLU, and initial values keyed by parameter name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsa_train.ops.experts import swiglu
from nsa_train.ops.norm import rms_norm, sum_and_norm
from nsa_train.ops.rope import rotate
from nsa_train.runtime import seed_of


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 also for bf16."""

    STARTS: ClassVar = {"weight": torch.ones}

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class SumNorm(RMSNorm):
    """(x + y, its RMSNorm)."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return sum_and_norm(x, y, self.weight, self.eps)


YARN_SLOW, YARN_FAST = 1.0, 32.0  # alpha and beta: turns within the trained length


def rope_angles(
    positions: Tensor, dim: int, theta: float, factor: float = 1.0, trained_len: int = 1
) -> tuple[Tensor, Tensor]:
    """cos and sin [T, dim / 2] fp32 of each position, computed in forward: nothing to store or to lose on load.

    With a factor s above 1, YaRN (arXiv 2309.00071, eq. 20-23): pairs that turn less than once in `trained_len` tokens
    are slowed down s times, those that turn more than 32 times stay, the others lie between. Both tables grow by
    0.1 ln(s) + 1, so every score of a rotated query and key grows by its square, whatever the branch.
    """
    frequency = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    scale = 1.0
    if factor > 1:
        turns = trained_len * frequency / (2 * math.pi)
        kept = ((turns - YARN_SLOW) / (YARN_FAST - YARN_SLOW)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
        scale = 0.1 * math.log(factor) + 1
    angle = positions.float()[:, None] * frequency
    return angle.cos() * scale, angle.sin() * scale


def apply_rope(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x [T, H, D]."""
    return rotate(x, *angles)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


class Head(nn.Linear):
    """[T, M] -> logits [T, V], to which a fixed prior is added; it is no weight, and 0 until it is set."""

    prior: Tensor

    def __init__(self, width: int, vocab: int) -> None:
        super().__init__(width, vocab, bias=False)
        prior = torch.zeros(vocab, dtype=torch.float32, device="cpu")  # real, even in a model on the meta device
        self.register_buffer("prior", prior)

    def set_prior(self, counts: Tensor) -> None:
        """ln of each token's frequency over the highest one, from `counts` [V], add-one smoothed; at most 0.

        Rounded to bf16, so that the logits get the same one in every dtype; what occurs often loses least.
        """
        counted = counts.double() + 1
        self.prior.copy_((counted / counted.max()).log().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.prior.to(x.dtype))


def normal(shape: torch.Size, name: str, seed: int, std: float) -> Tensor:
    """fp32 from a generator that knows only (seed, name, shape), so other parameters never change the values."""
    generator = torch.Generator().manual_seed(seed_of(seed, name, tuple(shape)))
    return torch.empty(shape, dtype=torch.float32).normal_(0, std, generator=generator)


def fixed_starts(module: nn.Module) -> dict[str, Callable[[torch.Size], Tensor]]:
    """What makes the initial values that are not random, by parameter: modules name them in `STARTS`."""
    return {
        f"{prefix}.{name}".removeprefix("."): make
        for prefix, part in module.named_modules()
        for name, make in getattr(part, "STARTS", {}).items()
    }
