"""Selection in plain Triton: importance of the blocks from the compressed probabilities, and the n best of them.

Paper eq. 8 to 11. Reference: `ops.reference.importance`, `select_blocks`. Notes: docs/kernels/compressed.md.

    T  tokens, packed    C  rows of compressed keys    Hq, Hk  query and KV heads    G = Hq // Hk    D  key width
    l  cmp_block    d  cmp_stride    l'  slc_block    n  slc_count    B = l' / d  compressed keys that start in a block

A compressed key that starts in block j may reach into the blocks j + 1, j + 2, ...; what it gives to block j + r goes
to plane r of block j, PLANES = 1 + ceil((l / d - 1) / B) in all (2 with the paper's sizes). The score of block j is the
sum over r of plane r of block j - r. So a program of the importance kernel only sums what starts in its own blocks.

Scores live for a few thousand tokens at a time, [pieces, Hk, blocks, TOKENS, PLANES] float32, SCRATCH_BYTES at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_train.ops.compressed import keys_seen
from nsa_train.ops.documents import TOKEN_TILE, Documents
from nsa_train.ops.reference import NSASpec
from nsa_train.ops.rows import load_rows, token_piece
from nsa_train.ops.tiles import LOG2E, power_of_two, split_width

SCRATCH_BYTES = 2**28  # 8192 tokens of 64k at Hk = 4
COLUMNS = 128  # tokens times padded heads in a tile of importance
KEYS = 64  # compressed keys in a step of importance
CHOOSERS = 8  # tokens that a program of top-n owns
SEGMENT = 16  # blocks in a segment of top-n, at least


@triton.jit
def _importance(
    q,  # [T, Hq, D]
    k,  # [C, Hk, D]
    lse,  # [T, Hq]  float32
    scores,  # [pieces, Hk, blocks, TOKENS, PLANES]  float32
    table,  # [6, M]  int32
    M, first_piece, blocks, scale,
    Hk: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    CMP_BLOCK: tl.constexpr, CMP_STRIDE: tl.constexpr, SLC_BLOCK: tl.constexpr, SLC_LOCAL: tl.constexpr,
    TABLE_TILE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCKS: tl.constexpr, STEP: tl.constexpr,
    PLANES: tl.constexpr, PLANES_PAD: tl.constexpr,
):  # fmt: skip
    """Scores of the blocks that are not forced as local ones, for one piece of tokens and one KV head.

    Keys lie on the rows of a tile and (head, token) on its columns, so that a thread sums over heads by itself.
    """
    PER_BLOCK: tl.constexpr = SLC_BLOCK // CMP_STRIDE
    REACH: tl.constexpr = CMP_BLOCK // CMP_STRIDE
    g = tl.program_id(1)
    piece = tl.num_programs(0) - 1 - tl.program_id(0)
    start, end, doc_start, doc_cmp = token_piece(table, M, first_piece + piece, TOKENS, TABLE_TILE)
    wanted = (end - 1 - doc_start) // SLC_BLOCK + 1 - SLC_LOCAL  # blocks 0 ... wanted can be chosen
    if (start >= end) | (wanted <= 0):
        return
    column = tl.arange(0, HEADS * TOKENS)
    head, token = column // TOKENS, column % TOKENS
    ok = (start + token < end) & (head < G)
    first_head = start.to(tl.int64) * (Hk * G) + g * G
    head += token * (Hk * G)
    q += first_head * D
    q1 = load_rows(q, head * D, ok, 0, D1, D).T
    q2 = load_rows(q, head * D, ok, D1, D2, D).T if D2 > 0 else q1
    column_lse = tl.load(lse + first_head + head, mask=ok, other=float("inf"))
    k += (doc_cmp.to(tl.int64) * Hk + g) * D
    own = tl.arange(0, TOKENS)
    seen = keys_seen(start + own - doc_start, CMP_BLOCK, CMP_STRIDE)
    some = keys_seen(end - 1 - doc_start, CMP_BLOCK, CMP_STRIDE)
    block, slot, plane = tl.arange(0, BLOCKS), tl.arange(0, STEP), tl.arange(0, PLANES_PAD)
    out = scores + (piece.to(tl.int64) * Hk + g) * blocks * (TOKENS * PLANES)
    out += own[None, :, None] * PLANES + plane[None, None, :]
    row = tl.arange(0, BLOCKS * STEP)
    for first in tl.range(0, wanted, BLOCKS):
        total = tl.zeros([BLOCKS, TOKENS, PLANES_PAD], tl.float32)
        for i in tl.static_range(0, PER_BLOCK, STEP):
            at = i + row % STEP  # place of the key in its block
            key = (first + row // STEP) * PER_BLOCK + at
            there = (at < PER_BLOCK) & (key < some)
            s = tl.dot(load_rows(k, key * (Hk * D), there, 0, D1, D), q1, input_precision="ieee")
            if D2 > 0:
                s = tl.dot(load_rows(k, key * (Hk * D), there, D1, D2, D), q2, s, input_precision="ieee")
            p = tl.exp2(s * scale - column_lse[None, :])
            p = tl.sum(tl.reshape(p, [BLOCKS * STEP, HEADS, TOKENS]), 1)
            p = tl.where((at < PER_BLOCK)[:, None] & (key[:, None] < seen[None, :]), p, 0.0)
            p = tl.reshape(p, [BLOCKS, STEP, TOKENS])
            # tokens, in units of d, that the key at this place shares with the block `plane` blocks further
            from_slot = tl.maximum(i + slot[:, None], plane[None, :] * PER_BLOCK)
            to_slot = tl.minimum(i + slot[:, None] + REACH, (plane[None, :] + 1) * PER_BLOCK)
            overlap = tl.maximum(to_slot - from_slot, 0).to(tl.float32)
            total += tl.sum(p[:, :, :, None] * overlap[None, :, None, :], 1)
        j = (first + block)[:, None, None]
        tl.store(out + j * (TOKENS * PLANES), total, mask=(j < wanted) & (plane < PLANES)[None, None, :])


@triton.jit
def _block_scores(scores, j, may, TOKENS: tl.constexpr, PLANES: tl.constexpr):
    """Scores of blocks j, the sum of their planes; -1 where not `may`. NaN counts as 0."""
    at = scores + j * (TOKENS * PLANES)
    total = tl.load(at, mask=may, other=0.0)
    for r in tl.static_range(1, PLANES):
        total += tl.load(at - r * (TOKENS * PLANES - 1), mask=may & (j >= r), other=0.0)
    return tl.where(may, tl.where(total > 0.0, total, 0.0), -1.0)


@triton.jit
def _topn(
    scores,  # [pieces, Hk, blocks, TOKENS, PLANES]  float32
    chosen,  # [T, Hk, n]  int32
    table,  # [6, M]  int32
    M, first_piece, blocks,
    Hk: tl.constexpr, SLC_BLOCK: tl.constexpr, N: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    TABLE_TILE: tl.constexpr, TOKENS: tl.constexpr, PLANES: tl.constexpr, CHOOSERS: tl.constexpr,
    FREE: tl.constexpr, FREE_PAD: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, N_PAD: tl.constexpr,
):  # fmt: skip
    """Blocks of CHOOSERS tokens of one KV head, ascending.

    The FREE best blocks lie in the FREE segments with the largest maxima, ties to the lower index in both rankings. So
    one pass takes the maxima of all segments, and a second one ranks only the blocks of the best segments.
    """
    PER: tl.constexpr = TOKENS // CHOOSERS
    g = tl.program_id(1)
    piece = tl.program_id(0) // PER
    start, end, doc_start, _ = token_piece(table, M, first_piece + piece, TOKENS, TABLE_TILE)
    token = tl.program_id(0) % PER * CHOOSERS + tl.arange(0, CHOOSERS)
    last = tl.minimum(end - 1, start + tl.program_id(0) % PER * CHOOSERS + CHOOSERS - 1)
    if start + tl.program_id(0) % PER * CHOOSERS >= end:
        return
    m = (start + token - doc_start) // SLC_BLOCK
    out = chosen + (start.to(tl.int64) * Hk + g) * N + token * (Hk * N)
    ok = start + token < end
    slot = tl.arange(0, N_PAD)
    between = m + 1 - INIT - LOCAL  # blocks that are not forced; 0 or less: all are forced
    found = tl.minimum(tl.maximum(between, 0), FREE)
    local = slot[None, :] - (INIT + found)[:, None]
    forced = tl.where(slot[None, :] < INIT, slot[None, :], (m - LOCAL + 1)[:, None] + local)
    forced = tl.where((between > 0)[:, None], forced, slot[None, :])
    is_forced = (slot[None, :] < INIT) | (local >= 0) | (between <= 0)[:, None]
    tl.store(
        out[:, None] + slot[None, :], tl.where(forced <= m[:, None], forced, -1),
        mask=ok[:, None] & is_forced & (slot < N)[None, :],
    )  # fmt: skip
    if FREE > 0:
        scores += (piece.to(tl.int64) * Hk + g) * blocks * (TOKENS * PLANES) + (token * PLANES)[:, None]
        STEP: tl.constexpr = 16 * SEGMENT
        maxima = tl.full([CHOOSERS, SEGMENTS // 16, 16], -2.0, tl.float32)
        for first in tl.range(INIT // STEP * STEP, (last - doc_start) // SLC_BLOCK + 1 - LOCAL, STEP):
            j = first + tl.arange(0, STEP)[None, :]
            may = (j >= INIT) & (j <= (m - LOCAL)[:, None])
            s = _block_scores(scores, j, may, TOKENS, PLANES)
            s = tl.max(tl.reshape(s, [CHOOSERS, 16, SEGMENT]), 2)
            here = tl.arange(0, SEGMENTS // 16)[None, :, None] == first // STEP
            maxima = tl.where(here, s[:, None, :], maxima)
        maxima = tl.reshape(maxima, [CHOOSERS, SEGMENTS])
        rank = tl.arange(0, FREE_PAD)[None, :]
        best = tl.full([CHOOSERS, FREE_PAD], SEGMENTS, tl.int32)
        for i in tl.range(0, FREE):
            segment = tl.argmax(maxima, 1, tie_break_left=True)[:, None]
            best = tl.where(rank == i, segment, best)
            maxima = tl.where(tl.arange(0, SEGMENTS)[None, :] == segment, -3.0, maxima)
        j = best[:, :, None] * SEGMENT + tl.arange(0, SEGMENT)[None, None, :]
        j = tl.reshape(j, [CHOOSERS, FREE_PAD * SEGMENT])
        may = (j >= INIT) & (j <= (m - LOCAL)[:, None])
        s = _block_scores(scores, j, may, TOKENS, PLANES)
        NONE: tl.constexpr = 1 << 30
        free = tl.full([CHOOSERS, FREE_PAD], NONE, tl.int32)
        for i in tl.range(0, FREE):
            value = tl.max(s, 1)[:, None]
            block = tl.min(tl.where((s == value) & (s >= 0.0), j, NONE), 1)[:, None]
            free = tl.where(rank == i, block, free)
            s = tl.where(j == block, -2.0, s)
        free = tl.sort(free, 1)
        tl.store(out[:, None] + INIT + rank, free, mask=ok[:, None] & (rank < found[:, None]))


def planes(spec: NSASpec) -> int:
    """How many blocks a compressed key can give to: its own and those it reaches into."""
    return 1 + math.ceil((spec.cmp_block // spec.cmp_stride - 1) / (spec.slc_block // spec.cmp_stride))


def importance(
    q: Tensor, k: Tensor, lse: Tensor, documents: Documents, spec: NSASpec, scale: float, scores: Tensor,
    first_piece: int,
) -> None:  # fmt: skip
    """s[t, g, j] = sum over heads h of g and keys c of overlap(c, j)/d exp2(scale log2(e) q . k - lse), eq. 9 and 10.

    scores [pieces, Hk, blocks, TOKENS, PLANES]   written, for pieces of TOKENS tokens from piece `first_piece`
    """
    (Hq, D), Hk = q.shape[1:], k.shape[1]
    D1, D2 = split_width(D)
    tokens, per_block = scores.shape[3], spec.slc_block // spec.cmp_stride
    step = min(power_of_two(per_block), KEYS)
    table = documents.token_tiles(TOKEN_TILE)
    _importance[(len(scores), Hk)](
        q, k, lse, scores, table, table.shape[1], first_piece, scores.shape[2], scale * LOG2E,
        Hk=Hk, G=Hq // Hk, D=D, D1=D1, D2=D2, CMP_BLOCK=spec.cmp_block, CMP_STRIDE=spec.cmp_stride,
        SLC_BLOCK=spec.slc_block, SLC_LOCAL=spec.slc_local, TABLE_TILE=TOKEN_TILE, TOKENS=tokens,
        HEADS=power_of_two(Hq // Hk), BLOCKS=KEYS // step, STEP=step,
        PLANES=planes(spec), PLANES_PAD=power_of_two(planes(spec)), num_warps=4, num_stages=2,
    )  # fmt: skip


def topn(scores: Tensor, documents: Documents, spec: NSASpec, chosen: Tensor, first_piece: int) -> None:
    """Writes `chosen` [T, Hk, n] for the tokens of the pieces in `scores` (see `importance`), eq. 11."""
    free = spec.slc_count - spec.slc_init - spec.slc_local
    free_pad = power_of_two(free)
    blocks, tokens = scores.shape[2:4]
    # the first pass ranks SEGMENTS maxima, the second FREE segments: about equal where SEGMENT = sqrt(blocks / FREE)
    segment = power_of_two(math.isqrt(blocks // free_pad), SEGMENT)
    segments = power_of_two(triton.cdiv(blocks, segment), 16)
    table = documents.token_tiles(TOKEN_TILE)
    choosers = min(tokens, CHOOSERS)
    warps = min(8, power_of_two(choosers * max(segments, segment * free_pad) // 2048))
    _topn[(len(scores) * (tokens // choosers), scores.shape[1])](
        scores, chosen, table, table.shape[1], first_piece, blocks,
        Hk=scores.shape[1], SLC_BLOCK=spec.slc_block, N=spec.slc_count, INIT=spec.slc_init, LOCAL=spec.slc_local,
        TABLE_TILE=TOKEN_TILE, TOKENS=tokens, PLANES=planes(spec), CHOOSERS=choosers, FREE=free, FREE_PAD=free_pad,
        SEGMENTS=segments, SEGMENT=segment, N_PAD=power_of_two(spec.slc_count), num_warps=warps,
    )  # fmt: skip


def select_blocks(
    q: Tensor, k: Tensor, lse: Tensor, documents: Documents, spec: NSASpec, scale: float,
    scorer: Callable[..., None] = importance, tokens: int | None = None,
) -> Tensor:  # fmt: skip
    """The blocks each query reads: the first slc_init, the last slc_local, and the best of those between (eq. 11).

    q     [T, Hq, D]
    k     [C, Hk, D]    compressed keys
    lse   [T, Hq]       fp32, of `compressed.forward`; +inf gives scores of 0
    gives [T, Hk, n]    int32, blocks inside the document, ascending, -1 last
    `scorer` and the size of its pieces, `tokens`, are what the Hopper path replaces.
    """
    T, Hq = q.shape[:2]
    Hk = k.shape[1]
    tokens = tokens or min(max(COLUMNS // power_of_two(Hq // Hk), 1), TOKEN_TILE)
    chosen = torch.empty(T, Hk, spec.slc_count, dtype=torch.int32, device=q.device)
    pieces = documents.token_tiles(TOKEN_TILE).shape[1] * (TOKEN_TILE // tokens)
    shape = (Hk, triton.cdiv(T, spec.slc_block), tokens, planes(spec))
    room = min(pieces, max(1, SCRATCH_BYTES // (4 * math.prod(shape))))
    scores = torch.empty(room, *shape, dtype=torch.float32, device=q.device)
    for first in range(0, pieces, room):
        part = scores[: min(room, pieces - first)]
        scorer(q, k, lse, documents, spec, scale, part, first)
        topn(part, documents, spec, chosen, first)
    return chosen
