"""Compression phi of packed documents (paper eq. 7): [T, Hk, width] -> compressed keys or values [rows, Hk, width].

Reference: `reference.phi_*` of `reference.compressed_blocks`. Plain PyTorch, any device; on a GPU all kinds but
gated_pool run on the kernels of `compress_triton`.

A block of l = r d tokens is r neighbouring *segments* of d tokens. The segments are gathered once, the only copy of x;
overlapping blocks are never written out. A first layer W1 concat(block) is the sum over i of W1's i-th column slice
times segment c + i: one matrix product over segments, then r gathers and a sum on its small result.

Every movement of rows is a gather, forward and backward, so gradients are the same bits in every run.

    T  tokens, packed    Hk  KV heads    l  cmp_block    d  cmp_stride    r = l // d    rows = T // d, room for all
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_train.ops import compress_triton
from nsa_train.ops.segments import Segments
from nsa_train.ops.tiles import on_kernels


class _Gather(torch.autograd.Function):
    """Tokens to segments: [T, Hk, width] -> [rows, Hk, d, width]; backwards each token takes its segment's gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        head = torch.arange(x.shape[1], device=x.device)
        index = segments.tokens[:, None] * x.shape[1] + head[:, None]
        return x.reshape(-1, x.shape[2]).index_select(0, index.flatten()).view(*index.shape, x.shape[2])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        segments = ctx.segments
        _, Hk, d, width = grad.shape
        if len(grad) == 0:
            return grad.new_zeros(len(segments.place), Hk, width), None
        head = torch.arange(Hk, device=grad.device)
        segment, place = segments.place // d, segments.place % d
        index = ((segment[:, None] * Hk + head) * d + place[:, None]).flatten()
        dx = grad.reshape(-1, width).index_select(0, index).view(-1, Hk, width)
        return dx.masked_fill(~segments.in_segment[:, None, None], 0), None


def _sum_over_blocks(z: Tensor, segments: Segments) -> Tensor:
    """[rows of segments, r, ...] -> [rows of blocks, ...]: sum over i of z[first segment + i, i]; 0 if unused."""
    last = max(len(z) - 1, 0)
    parts = [z[:, i].index_select(0, (segments.first_segment + i).clamp(max=last)) for i in range(segments.count)]
    # Nothing in place: torch.compile (2.11, GPU) loses an addition in place inside an autograd.Function.
    total = functools.reduce(torch.add, parts)
    return total.masked_fill(_like(~segments.used, total), 0)


def _spread_to_segments(y: Tensor, segments: Segments) -> Tensor:
    """[rows of blocks, ...] -> [rows of segments, r, ...]: the block that has the segment as its i-th; 0 if none."""
    z = y.index_select(0, segments.block.flatten()).view(*segments.block.shape, *y.shape[1:])
    return z.masked_fill(_like(~segments.in_block, z), 0)


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.view(*mask.shape, *[1] * (x.ndim - mask.ndim))


class _ToBlocks(torch.autograd.Function):
    """`_sum_over_blocks`; its gradient is `_spread_to_segments`."""

    @staticmethod
    def forward(ctx, z: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        return _sum_over_blocks(z, segments)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _spread_to_segments(grad, ctx.segments), None


class _ToSegments(torch.autograd.Function):
    """`_spread_to_segments`; its gradient is `_sum_over_blocks`."""

    @staticmethod
    def forward(ctx, y: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        return _spread_to_segments(y, segments)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_over_blocks(grad, ctx.segments), None


def _mean(x: Tensor, segments: Segments) -> Tensor:
    """Sum of each segment, then of each block's segments, in fp32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.sum(2, dtype=wide)[:, None].expand(-1, segments.count, -1, -1)
    return (_ToBlocks.apply(total, segments) / segments.length).to(x.dtype)


def _linear(x: Tensor, segments: Segments, weight: Tensor, bias: Tensor) -> Tensor:
    """weight [D, l * D], bias [D]: each of its r column slices times every segment once."""
    rows, Hk, d, width = x.shape
    slices = weight.view(width, segments.count, d * width).transpose(0, 1).reshape(-1, d * width)  # [r * D, d * D]
    z = F.linear(x.reshape(rows * Hk, d * width), slices).view(rows, Hk, segments.count, width)
    return _ToBlocks.apply(z.transpose(1, 2), segments) + bias


def _mlp(x: Tensor, segments: Segments, w1: Tensor, bias: Tensor, w2: Tensor) -> Tensor:
    """Mean + W2 SiLU(W1 concat(block) + bias)."""
    return _mean(x, segments) + F.linear(F.silu(_linear(x, segments, w1, bias)), w2)


def _gated_pool(x: Tensor, segments: Segments, weight: Tensor, bias: Tensor) -> Tensor:
    """weight [D], bias [l]: softmax over the block's l tokens, in fp32 at least."""
    rows, Hk, d, _ = x.shape
    r = segments.count
    wide = torch.promote_types(x.dtype, torch.float32)
    logit = (x @ weight).to(wide)[:, None, :, None]  # [rows, 1, Hk, 1, d]: of a token, as a segment of any block
    own = torch.eye(r, dtype=wide, device=x.device)[:, None, :, None]  # [r, 1, r, 1]: segment i fills slot i
    logits = _ToBlocks.apply(logit * own, segments) + bias.view(r, d)  # [rows, Hk, r, d]
    share = logits.flatten(2).softmax(-1).view(rows, Hk, r, d)
    share = _ToSegments.apply(share, segments).diagonal(dim1=1, dim2=3)  # [rows, Hk, d, r]
    weighted = share.transpose(2, 3).to(x.dtype) @ x  # [rows, Hk, r, D]
    return _ToBlocks.apply(weighted.transpose(1, 2), segments)


KINDS: dict[str, Callable[..., Tensor]] = {"mlp": _mlp, "linear": _linear, "gated_pool": _gated_pool, "mean": _mean}


def compress(x: Tensor, segments: Segments, kind: str, *parameters: Tensor) -> Tensor:
    """Eq. 7's phi of every block of every document, document after document; zeros behind the last block.

    x           [T, Hk, width]   un-rotated keys, or values
    kind                         mlp (w1, bias, w2), linear (weight, bias), gated_pool (weight, bias), mean ();
                                 layouts as in `reference.phi_<kind>`
    gives       [T // d, Hk, width]  dtype of x
    """
    if kind != "gated_pool" and on_kernels(x):
        return compress_triton.compress(x, segments, *parameters)
    # Without a block the product that gives a weight's gradient would still read x, times 0: NaN if x is.
    parameters = tuple(torch.where(segments.any_used, p, 0) for p in parameters)
    y = KINDS[kind](_Gather.apply(x, segments), segments, *parameters)
    return torch.where(segments.used[:, None, None], y, 0)
