"""What the launch settings of kernels are made of: which kernels run where, and widths as powers of two."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

LOG2E = 1.4426950408889634  # kernels work with exp2; log-sum-exps between them are in base 2
WIDEST = 384  # D + Dv up to which full tiles of 2-byte numbers fit into the shared memory of a Hopper GPU
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED: bool = triton.knobs.runtime.interpret  # Triton's interpreter runs the kernels, on CPU tensors


def on_kernels(x: Tensor) -> bool:
    """Whether an op runs on its kernels, not on its form in PyTorch, which torch.compile fuses with its neighbours."""
    return x.is_cuda and x.dtype in KERNEL_DTYPES and not torch.compiler.is_compiling()


@functools.cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def power_of_two(n: int, at_least: int = 1) -> int:
    """The smallest one that is at least `n` and `at_least`."""
    return max(at_least, 1 << max(n - 1, 0).bit_length())


def split_width(width: int) -> tuple[int, int]:
    """Two powers of two (at least 16, what a matrix product takes; or 0) that cover a head width: 192 is 128 + 64.

    One padded power of two would waste a third of the work at 192.
    """
    whole = power_of_two(width, 16)
    if whole == width or width <= 16:
        return whole, 0
    low = whole // 2
    return (low, power_of_two(width - low, 16)) if width - low <= low // 2 else (whole, 0)
