"""Rotary positions: the pairs (i, i + D/2) of every head turned by the token's angle. In Triton on a GPU.

PyTorch's operations would pass over a float32 copy of the queries some ten times; the kernel passes over them once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_train.ops.tiles import on_kernels

PAIRS = 1024  # of a program
WARPS = 4


@triton.jit
def _rotate(
    x,  # [T, H, D]
    cos, sin,  # [T, D / 2]  float32
    out,  # [T, H, D]
    sign, N,  # N = T * H * D / 2 pairs
    H: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    mask = pair < N
    i, head = pair % HALF, pair // HALF
    at = head * (2 * HALF) + i
    angle = head // H * HALF + i
    a = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + at + HALF, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + angle, mask=mask, other=0.0)
    s = tl.load(sin + angle, mask=mask, other=0.0) * sign
    tl.store(out + at, (a * c - b * s).to(out.dtype.element_ty), mask=mask)
    tl.store(out + at + HALF, (b * c + a * s).to(out.dtype.element_ty), mask=mask)


def rotate_kernel(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """`rotate` by the angles (sign 1), or its transpose, which turns back a gradient (sign -1)."""
    (_, H, D), N = x.shape, x.numel() // 2
    out = torch.empty_like(x)
    _rotate[(triton.cdiv(N, PAIRS),)](x, cos, sin, out, sign, N, H=H, HALF=D // 2, PAIRS=PAIRS, num_warps=WARPS)
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate_kernel(x.contiguous(), cos, sin, 1.0)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return rotate_kernel(grad.contiguous(), cos, sin, -1.0), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of x [T, H, D] by angles with these cos and sin [T, D/2] fp32; dtype of x."""
    if on_kernels(x):
        return _Rotate.apply(x, cos.contiguous(), sin.contiguous())
    return plain_rotate(x, cos, sin)


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` by PyTorch's operations."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
