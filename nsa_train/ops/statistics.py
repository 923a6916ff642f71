"""What NSA's selection does: which blocks it reads, how neighbours share them, and how much attention they hold.

All functions speak about one document of L tokens; letters and shapes as in `ops.reference`, blocks [L, Hk, n]. Those
that take `first` look at the queries from there on: before token n l' a query reads every block, and chooses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_train.ops.reference import NSASpec, attend, slc_visible

CHUNK_BYTES = 2**27  # of probabilities at a time


@torch.no_grad()
def selection_statistics(q: Tensor, k_slc: Tensor, v_slc: Tensor, blocks: Tensor, spec: NSASpec) -> dict[str, float]:
    """Three numbers for a log, in time and memory O(L^2).

    forced_mass        share of the selected branch's attention that falls on forced blocks, mean over queries and heads
    distance_tokens    mean distance from a query's block to the free blocks it chose, in tokens
    neighbour_overlap  share of a query's blocks that the next query reads too
    """
    L = q.shape[0]
    _, p = attend(q, k_slc, v_slc, slc_visible(blocks, L, spec), q.shape[-1] ** -0.5)
    block = torch.arange(L, device=q.device) // spec.slc_block
    distance = free_distances(blocks, 0, spec)
    chosen = distance[distance > 0].float() * spec.slc_block
    return {
        "forced_mass": float((p * is_forced(block, block[:, None], spec)).sum(-1).mean()),
        "distance_tokens": float(chosen.mean()) if chosen.numel() else 0.0,
        "neighbour_overlap": float(read_by_next(blocks).sum() / (blocks[:-1] >= 0).sum().clamp(min=1)),
    }


# Sets of blocks -------------------------------------------------------------------------------------------------------


def is_forced(block: Tensor, own: Tensor, spec: NSASpec) -> Tensor:
    """Whether a query in block `own` reads `block` without choosing it, where it does not lie in its future."""
    return (block < spec.slc_init) | (block > own - spec.slc_local)


def free_distances(blocks: Tensor, first: int, spec: NSASpec) -> Tensor:
    """[L - first, Hk, n]: blocks from the query's own back to each free one it chose; 0 for forced ones and padding."""
    own = torch.arange(first, len(blocks), device=blocks.device)[:, None, None] // spec.slc_block
    chosen = blocks[first:]
    return (own - chosen).masked_fill((chosen < 0) | is_forced(chosen, own, spec), 0)


def read_by_next(blocks: Tensor) -> Tensor:
    """[L - 1, Hk]: how many of a query's blocks the next query reads too."""
    this, following = blocks[:-1, :, :, None], blocks[1:, :, None]
    return ((this == following) & (this >= 0)).any(-1).sum(-1)


def distinct_blocks(blocks: Tensor, together: int) -> Tensor:
    """[L // together, Hk]: how many different blocks each group of so many neighbouring queries reads."""
    whole = blocks[: len(blocks) // together * together]
    sets = whole.unflatten(0, (-1, together)).transpose(1, 2).flatten(2).sort(-1).values  # [groups, Hk, together n]
    return (F.pad(sets, (1, 0), value=-1).diff(dim=-1) != 0).sum(-1)


# Full attention, and the share of it that sets of blocks hold ---------------------------------------------------------


def full_attention(q: Tensor, k: Tensor, first: int = 0, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
    """Probabilities of causal attention over all keys, for a few queries from `first` on at a time.

    q, k      [L, Hq, D], [L, Hk, D]
    multiple  queries of a chunk, the last one's aside, are a multiple of this
    gives     (the chunk's first query a, p [Hk, G, Q, a + Q] fp32)
    """
    L, Hq, D = q.shape
    size = max(1, CHUNK_BYTES // (4 * Hq * L * multiple)) * multiple
    for a in range(first, L, size):
        b = min(L, a + size)
        t = torch.arange(a, b, device=q.device)
        yield a, attend(q[a:b], k[:b], k[:b], torch.arange(b, device=q.device) <= t[:, None], D**-0.5)[1]


def block_mass(p: Tensor, spec: NSASpec) -> Tensor:
    """What each block holds of probabilities over S keys, mean of the group's heads: [Hk, G, Q, S] -> [Hk, Q, J]."""
    S = p.shape[-1]
    J = -(-S // spec.slc_block)
    return F.pad(p.mean(1), (0, J * spec.slc_block - S)).unflatten(-1, (J, -1)).sum(-1)


class Held(NamedTuple):
    """Shares of the full attention, each [Hk] float64, summed over queries.

    selected  in the blocks that are read
    best      in the n blocks that hold most
    random    in forced blocks and, expected, in free ones drawn with equal chances until there are n
    forced    in forced blocks
    """

    selected: Tensor
    best: Tensor
    random: Tensor
    forced: Tensor


@torch.no_grad()
def attention_held(q: Tensor, k: Tensor, blocks: Tensor, first: int, spec: NSASpec) -> Held:
    """How much of the attention over all keys (mean over the group's heads) sets of at most n blocks hold.

    q, k  [L, Hq, D], [L, Hk, D]
    """
    total = torch.zeros(len(Held._fields), k.shape[1], dtype=torch.float64, device=q.device)
    for a, p in full_attention(q, k, first):
        mass = block_mass(p, spec)
        _, Q, J = mass.shape
        own, j = torch.arange(a, a + Q, device=q.device)[:, None] // spec.slc_block, torch.arange(J, device=q.device)
        forced = is_forced(j, own, spec) & (j <= own)
        free = ~forced & (j <= own)
        odds = (spec.slc_count - forced.sum(-1)) / free.sum(-1).clamp(min=1)
        chosen = blocks[a : a + Q].transpose(0, 1).long()
        shares = (
            mass.gather(-1, chosen.clamp(min=0)) * (chosen >= 0),
            mass.topk(min(spec.slc_count, J), -1).values,
            mass * (forced + free * odds.clamp(max=1)[:, None]),
            mass * forced,
        )
        total += torch.stack([share.double().sum((1, 2)) for share in shares])
    return Held(*total)
