"""Blocks that no score chooses, for ablations: the forced ones alone, or with free ones drawn at random."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_train.ops.reference import NSASpec

NONE = torch.iinfo(torch.int32).max  # in place of a block that is not there: sorted last


@torch.compiler.disable  # minutes of compilation for `_distinct`, to save a few launches
def fixed_blocks(positions: Tensor, Hk: int, spec: NSASpec, draw: Tensor | None = None) -> Tensor:
    """The blocks each query reads, int32 [T, Hk, n], ascending, -1 last; legal as those of `reference.select_blocks`.

    positions  [T]          inside the documents: of other documents, and of T, nothing depends
    draw       scalar int64, 0 ... 2**32 - 1: as many free blocks as n has room for, any set of them with one
                            probability, by a hash of (draw, position, head) without a state; None: no free blocks
    """
    m = positions.long()[:, None, None] // spec.slc_block  # the query's own block
    first = torch.arange(spec.slc_init, device=m.device)
    last = m - torch.arange(spec.slc_local, device=m.device)
    parts = [first.where(first <= m, NONE), last.where(last >= spec.slc_init, NONE)]
    parts = [part.expand(-1, Hk, -1) for part in parts]
    if draw is not None:
        count = spec.slc_count - spec.slc_init - spec.slc_local
        chosen = _distinct(m + 1 - spec.slc_init - spec.slc_local, _random(positions.long(), Hk, count, draw))
        parts.append((chosen + spec.slc_init).where(chosen >= 0, NONE))
    blocks = torch.cat(parts, -1).sort(-1).values
    blocks = F.pad(blocks, (0, spec.slc_count - blocks.shape[-1]), value=NONE)
    return blocks.masked_fill(blocks == NONE, -1).to(torch.int32)


def _random(positions: Tensor, Hk: int, count: int, draw: Tensor) -> Tensor:
    """Numbers of 32 bits, int64 [T, Hk, count]."""
    keys = _mixed(_mixed(positions) ^ draw)[:, None] + torch.arange(Hk, device=positions.device)
    return _mixed(_mixed(keys)[..., None] + torch.arange(count, device=positions.device))


def _mixed(x: Tensor) -> Tensor:
    """A permutation of the numbers of 32 bits that looks like chance; above that, bits are dropped."""
    for _ in range(2):
        x = (x ^ (x >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    return x ^ (x >> 16)


def _distinct(size: Tensor, random: Tensor) -> Tensor:
    """A set of numbers below `size` [T, 1, 1], as [T, Hk, count]; where size < count, all of them beside negative ones.

    Floyd's: number i is below size - count + i + 1, and the largest such where the one drawn has been taken.
    """
    count = random.shape[-1]
    largest = size - count + torch.arange(count, device=size.device)
    chosen = torch.where(largest < 0, largest, random % (largest + 1).clamp(min=1))
    for i in range(1, count):
        taken = (chosen[..., :i] == chosen[..., i : i + 1]).any(-1)
        chosen[..., i] = torch.where(taken, largest[..., i], chosen[..., i])
    return chosen
