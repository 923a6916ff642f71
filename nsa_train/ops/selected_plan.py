"""What the kernels of selected attention walk along, made from the chosen blocks: unions of blocks, readers of blocks.

    T  tokens, packed    Hk  KV heads    n, l'  slc_count, slc_block    M  columns of `documents.token_tiles(l')`

A column of that table is a selection block of a document. A *tile* is up to TOKENS consecutive tokens of a column, so
all its tokens lie in one block, which is the last of their union. Forward and dQ walk a tile's union; dK and dV walk a
block's readers, cut into work items. Chosen blocks behind a token's own are left out here: nothing in them is visible.
No shape depends on the chosen blocks, nothing is added atomically.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_train.ops.documents import Documents
from nsa_train.ops.reference import NSASpec
from nsa_train.ops.tiles import power_of_two

MASK_BITS = tl.constexpr(8)  # an entry of a union: block << MASK_BITS | bit i: token i of the tile chose it
NO_KEY = tl.constexpr(1 << 30)  # behind every block in a sort
MOST_TOKENS = 8  # in a tile
ITEM_TOKENS = 2048  # of a work item; 512 and 1024 cost 5 % of dK/dV more
SUM_KEYS = 16  # keys of a program that adds partial sums


class Unions(NamedTuple):
    """The blocks that some token of a tile chose.

    entries  [Hk, TILES, TOKENS * n]  int32, ascending: block << 8 | mask of the tile's tokens
    counts   [Hk, TILES]              int32, entries of a tile; unwritten where a tile has no token
    chose    [Hk, M, TILES]           uint8, the same masks by block and tile, 0 elsewhere (34 MB at T = 64k, T^2)
    """

    entries: Tensor
    counts: Tensor
    chose: Tensor | None


class Readers(NamedTuple):
    """The tokens that read a block, ascending, and the work items of dK and dV. A list is g * M + column of the table.

    tokens  [T * Hk * n]  int32, list behind list
    work    [5, W]        int32: list (-1: nothing to do), lo and hi in `tokens`, lo inside the list, slot (-1: none)
    sizes   [3, Hk * M]   int32, of each list: tokens, work items, slots for partial sums (0 where one item does it all)
    ends    [3, Hk * M]   int32, their inclusive sums
    slots                 rows that partial sums need at most
    """

    tokens: Tensor
    work: Tensor
    sizes: Tensor
    ends: Tensor
    slots: int


# Unions ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _or_equal(key_a, mask_a, key_b, mask_b):
    return key_b, tl.where(key_a == key_b, mask_a | mask_b, mask_b)


@triton.jit
def _selected_unions(
    blocks,   # [T, Hk, n]
    entries,  # [Hk, TILES, TOKENS * n]
    counts,   # [Hk, TILES]
    chose,    # [Hk, M, TILES] or None
    table,    # [6, M]
    M, TILES,
    Hk: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, TOKENS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One warp a tile: sort (block, token), OR the token bits of equal blocks, keep the last of each."""
    tile, g = tl.program_id(0), tl.program_id(1)
    column = tile // PIECES
    start = tl.load(table + column) + tile % PIECES * TOKENS
    end = tl.load(table + M + column)
    if start >= end:
        return
    first = tl.load(table + 5 * M + column)
    SIZE: tl.constexpr = TOKENS * NP
    i = tl.arange(0, SIZE)
    token, place = start + i // NP, i % NP
    there = (token < end) & (place < N)
    block = tl.load(blocks + (token.to(tl.int64) * Hk + g) * N + place, mask=there, other=-1)
    visible = (block >= 0) & (block <= column - first)
    key = tl.sort(tl.where(visible, block * TOKENS + i // NP, NO_KEY))
    block, mask = tl.associative_scan((key // TOKENS, 1 << (key % TOKENS)), 0, _or_equal)
    behind = tl.gather(block, tl.minimum(i + 1, SIZE - 1), 0)
    last = ((behind != block) | (i == SIZE - 1)) & (block < NO_KEY // TOKENS)
    rank = tl.cumsum(last.to(tl.int32), 0) - 1
    mine = (g * TILES + tile).to(tl.int64)
    tl.store(entries + mine * (TOKENS * N) + rank, (block << MASK_BITS) | mask, mask=last)
    tl.store(counts + mine, tl.sum(last.to(tl.int32), 0))
    if chose is not None:
        tl.store(chose + (g * M + first + block).to(tl.int64) * TILES + tile, mask.to(tl.uint8), mask=last)


def unions(blocks: Tensor, documents: Documents, spec: NSASpec, tokens: int, by_block: bool) -> Unions:
    """Unions of tiles of `tokens` tokens (a power of two up to 8); blocks [T, Hk, n]. `by_block`: `chose` too."""
    _, Hk, n = blocks.shape
    table = documents.token_tiles(spec.slc_block)
    M, pieces = table.shape[1], triton.cdiv(spec.slc_block, tokens)
    tiles = M * pieces
    new = {"dtype": torch.int32, "device": blocks.device}
    entries, counts = torch.empty(Hk, tiles, tokens * n, **new), torch.empty(Hk, tiles, **new)
    chose = torch.zeros(Hk, M, tiles, dtype=torch.uint8, device=blocks.device) if by_block else None
    padded = max(power_of_two(n), 2)
    _selected_unions[(tiles, Hk)](
        blocks, entries, counts, chose, table, M, tiles, Hk=Hk, N=n, NP=padded, TOKENS=tokens, PIECES=pieces,
        num_warps=min(max(tokens * padded // 256, 1), 8),
    )  # fmt: skip
    return Unions(entries, counts, chose)


# Readers --------------------------------------------------------------------------------------------------------------


@triton.jit
def _tiles_behind(table, M, column, L: tl.constexpr, PIECES: tl.constexpr):
    """Tiles from block `column` to the end of its document: who may read the block. Empty for an unused column."""
    length = tl.load(table + 3 * M + column) - tl.load(table + 2 * M + column)
    return column * PIECES, (tl.load(table + 5 * M + column) + tl.cdiv(length, L)) * PIECES


@triton.jit
def _bits_set(mask):
    """How many of the 8 low bits are set."""
    pairs = mask - ((mask >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0x0F


@triton.jit
def _selected_reader_counts(
    chose,  # [Hk, M, TILES]
    sizes,  # [3, Hk * M]
    table,  # [6, M]
    M, TILES, LISTS, L: tl.constexpr, PIECES: tl.constexpr, ITEM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    column, g = tl.program_id(0), tl.program_id(1)
    mine = g * M + column
    begin, stop = _tiles_behind(table, M, column, L, PIECES)
    tokens = tl.zeros([WIDTH], tl.int32)
    for at in range(begin, stop, WIDTH):
        tile = at + tl.arange(0, WIDTH)
        mask = tl.load(chose + mine.to(tl.int64) * TILES + tile, mask=tile < stop, other=0)
        tokens += _bits_set(mask.to(tl.int32))
    count = tl.sum(tokens, 0)
    items = tl.cdiv(count, ITEM)
    tl.store(sizes + mine, count)
    tl.store(sizes + LISTS + mine, items)
    tl.store(sizes + 2 * LISTS + mine, tl.where(items > 1, items, 0))


@triton.jit
def _selected_reader_lists(
    chose,         # [Hk, M, TILES]
    sizes, ends,   # [3, Hk * M]
    tokens,        # [T * Hk * n]
    work,          # [5, W]
    table,         # [6, M]
    M, TILES, LISTS, W,
    L: tl.constexpr, TOKENS: tl.constexpr, PIECES: tl.constexpr, ITEM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    column, g = tl.program_id(0), tl.program_id(1)
    mine = g * M + column
    begin, stop = _tiles_behind(table, M, column, L, PIECES)
    doc_start, first = tl.load(table + 2 * M + column), tl.load(table + 5 * M + column)
    count, items = tl.load(sizes + mine), tl.load(sizes + LISTS + mine)
    lo = tl.load(ends + mine) - count
    written = lo
    for at in range(begin, stop, WIDTH):
        tile = at + tl.arange(0, WIDTH)
        mask = tl.load(chose + mine.to(tl.int64) * TILES + tile, mask=tile < stop, other=0).to(tl.int32)
        bits = _bits_set(mask)
        place = written + tl.cumsum(bits, 0) - bits
        token = doc_start + (tile // PIECES - first) * L + tile % PIECES * TOKENS
        for i in tl.static_range(TOKENS):
            bit = (mask >> i) & 1
            tl.store(tokens + place, token + i, mask=bit == 1)
            place += bit
        written += tl.sum(bits, 0)
    item = tl.load(ends + LISTS + mine) - items
    slot = tl.load(ends + 2 * LISTS + mine) - items
    for at in range(0, items, 32):
        i = at + tl.arange(0, 32)
        here = i < items
        place = work + item + i
        tl.store(place, mine + 0 * i, mask=here)
        tl.store(place + W, lo + i * ITEM, mask=here)
        tl.store(place + 2 * W, lo + tl.minimum((i + 1) * ITEM, count), mask=here)
        tl.store(place + 3 * W, i * ITEM, mask=here)
        tl.store(place + 4 * W, tl.where(items > 1, slot + i, -1), mask=here)


def readers(union: Unions, T: int, documents: Documents, spec: NSASpec) -> Readers:
    """Lists of the tokens that read each block, and the work items, from unions made with `by_block`."""
    assert union.chose is not None
    Hk, M, tiles = union.chose.shape
    table = documents.token_tiles(spec.slc_block)
    pieces = tiles // M
    lists, chosen = Hk * M, T * Hk * spec.slc_count
    W = lists + chosen // ITEM_TOKENS
    new = {"dtype": torch.int32, "device": union.chose.device}
    sizes, tokens = torch.empty(3, lists, **new), torch.empty(chosen, **new)
    work = torch.full((5, W), -1, **new)
    launch = {"L": spec.slc_block, "PIECES": pieces, "ITEM": ITEM_TOKENS, "WIDTH": 1024, "num_warps": 4}
    _selected_reader_counts[(M, Hk)](union.chose, sizes, table, M, tiles, lists, **launch)
    ends = sizes.cumsum(1, dtype=torch.int32)
    _selected_reader_lists[(M, Hk)](
        union.chose, sizes, ends, tokens, work, table, M, tiles, lists, W,
        TOKENS=union.entries.shape[2] // spec.slc_count, **launch,
    )  # fmt: skip
    return Readers(tokens, work, sizes, ends, 2 * chosen // ITEM_TOKENS + 1)


# Partial sums ---------------------------------------------------------------------------------------------------------


@triton.jit
def _sum_parts(
    part, out, slot, items, inside, row, there,
    D: tl.constexpr, L: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows `row` of out [T * Hk, D] from the partial sums of slots `slot` ... `slot` + items - 1."""
    for c in tl.static_range(0, D, WIDTH):
        d = c + tl.arange(0, WIDTH)
        mask = there[:, None] & (d < D)[None, :]
        total = tl.zeros([KEYS, WIDTH], tl.float32)
        for i in range(items):
            total += tl.load(part + ((slot + i) * L + inside)[:, None] * D + d[None, :], mask=mask, other=0.0)
        tl.store(out + row[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _selected_dkv_sum(
    part_k, part_v,  # [slots, l', D], [slots, l', Dv]  fp32
    dk, dv,          # [T, Hk, D], [T, Hk, Dv]
    sizes, ends,     # [3, Hk * M]
    table,           # [6, M]
    M, LISTS,
    Hk: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, L: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums of a block in the order of its work items; zeros where nobody read the block."""
    mine = tl.program_id(0)
    items = tl.load(sizes + LISTS + mine)
    if items == 1:
        return
    slot = (tl.load(ends + 2 * LISTS + mine) - items).to(tl.int64)
    column = mine % M
    inside = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    key = tl.load(table + column) + inside
    there = (key < tl.load(table + M + column)) & (inside < L)
    row = key.to(tl.int64) * Hk + mine // M
    _sum_parts(part_k, dk, slot, items, inside, row, there, D, L, KEYS, WIDTH)
    _sum_parts(part_v, dv, slot, items, inside, row, there, DV, L, KEYS, WIDTH)


def partial_sums(read: Readers, L: int, D: int, Dv: int) -> tuple[Tensor, Tensor]:
    """Room for the partial sums of blocks with several work items (336 MB at T = 64k, 4 KV heads, 192/128)."""
    new = {"dtype": torch.float32, "device": read.work.device}
    return torch.empty(read.slots, L, D, **new), torch.empty(read.slots, L, Dv, **new)


def add_partial_sums(
    read: Readers, part_k: Tensor, part_v: Tensor, dk: Tensor, dv: Tensor, documents: Documents, spec: NSASpec
) -> None:
    """Completes dk [T, Hk, D] and dv [T, Hk, Dv]: the rows of every block that had not exactly one work item."""
    _, Hk, D = dk.shape
    table = documents.token_tiles(spec.slc_block)
    M = table.shape[1]
    _selected_dkv_sum[(Hk * M, triton.cdiv(spec.slc_block, SUM_KEYS))](
        part_k, part_v, dk, dv, read.sizes, read.ends, table, M, Hk * M,
        Hk=Hk, D=D, DV=dv.shape[2], L=spec.slc_block, KEYS=SUM_KEYS, WIDTH=64, num_warps=4,
    )  # fmt: skip
