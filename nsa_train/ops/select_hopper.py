"""Importance of the blocks for Hopper in Gluon; the n best are then chosen by `ops.select`.

A program owns 8 tokens of one document times the 16 heads of a KV head. Keys lie on the rows of its score tiles and
(head, token) on the columns, head first: the accumulator then holds all heads of a token in one thread, and their sum
needs no exchange. 4 warps and two programs an SM; two tiles a round, one in flight.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_train.ops import select
from nsa_train.ops.documents import TOKEN_TILE, Documents
from nsa_train.ops.gluon_names import barrier
from nsa_train.ops.reference import NSASpec
from nsa_train.ops.tiles import LOG2E
from nsa_train.ops.tiles_hopper import (
    PIECE,
    head_major_descriptors,
    key_descriptors,
    keys_seen,
    load_wide,
    load_wide_queries,
    takes,
    token_piece,
)

__all__ = ["select_blocks", "takes"]

STAGES = 2  # of K; a third costs the second program on the SM: 8.0 ms instead of 5.6
# Layout of [16 blocks, 4 keys, 8 tokens], a tile summed over heads: that of the accumulator, reshaped.
SUMMED = gl.DistributedLinearLayout(
    [[0, 0, 1], [2, 0, 0]], [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [1, 0, 0]], [[4, 0, 0], [8, 0, 0]], [],
    [16, 4, PIECE],
)  # fmt: skip


@gluon.jit
def _load(k1_desc, k2_desc, k1_buf, k2_buf, full, i, n, doc_cmp, column, D2: gl.constexpr, STAGES: gl.constexpr):
    """Asks for key tile i, if there is one."""
    bar = full.index(i % STAGES)
    mbarrier.expect(bar, 64 * 2 * (k1_desc.block_shape[1] + D2), i < n)
    load_wide(
        k1_desc, k2_desc, k1_buf.index(i % STAGES), k2_buf.index(i % STAGES), bar, doc_cmp + i * 64, column, D2, i < n
    )


@gluon.jit
def _scores(k1_buf, k2_buf, q1, q2, stage, zero, D2: gl.constexpr):
    s = warpgroup_mma(k1_buf.index(stage), q1.permute((1, 0)), zero, use_acc=False, is_async=True)
    if D2 > 0:
        s = warpgroup_mma(k2_buf.index(stage), q2.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _next(
    k1_desc, k2_desc, k1_buf, k2_buf, q1, q2, full, i, n, doc_cmp, column, zero,
    D2: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Tile i has been multiplied: refills its stage and starts the product of tile i + 1 (past the end: of the last
    tile once more, which nobody stores)."""
    barrier()  # every warp is done with the stage of tile i
    _load(k1_desc, k2_desc, k1_buf, k2_buf, full, i + STAGES, n, doc_cmp, column, D2, STAGES)
    following = gl.minimum(i + 1, n - 1)
    stage = following % STAGES
    mbarrier.wait(full.index(stage), (following // STAGES) & 1)
    return _scores(k1_buf, k2_buf, q1, q2, stage, zero, D2)


@gluon.jit
def _emit(s, lse, scale, i, key, seen, slot, weight, block, own, out, wanted, SUMMED: gl.constexpr):
    """Sums tile i over heads and over the keys of each block, and stores both planes of its 16 blocks.

    A block's four keys share 2, 2, 2, 1 times d tokens with it, and the last one 1 times d with the next block.
    """
    p = gl.sum(gl.exp2(s * scale - lse[None, :]).reshape([64, 16, 8]), 1)
    p = gl.convert_layout(p.reshape([16, 4, 8]), SUMMED, assert_trivial=True)
    p = gl.where(key + i * 64 < seen, p, 0.0)
    here = gl.sum(p * weight, 1)
    after = gl.sum(gl.where(slot == 3, p, 0.0), 1)
    at = ((i * 16 + block) * 8 + own) * 2
    at = gl.join(at, at + 1)
    gl.store(out + at, gl.join(here, after), mask=at < wanted * 16)


@gluon.jit
def _importance_hopper(
    q1_desc, q2_desc, k1_desc, k2_desc,
    lse_ptr,  # [T, Hq]  float32
    scores,  # [pieces, Hk, blocks, 8, 2]  float32
    table,  # [6, M]  int32
    M, first_piece, blocks, scale,
    Hq: gl.constexpr, D: gl.constexpr, D2: gl.constexpr, LOCAL: gl.constexpr, STAGES: gl.constexpr,
    SUMMED: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = q1_desc.dtype
    D1: gl.constexpr = D - D2
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    LINES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    TILES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    BLOCK_TOKEN: gl.constexpr = gl.SliceLayout(1, SUMMED)
    piece = gl.num_programs(0) - 1 - gl.program_id(0)
    g = gl.program_id(1)
    start, end, doc_start, doc_cmp = token_piece(table, M, first_piece + piece)
    wanted = (end - 1 - doc_start) // 64 + 1 - LOCAL  # blocks 0 ... wanted can be chosen
    if (start >= end) | (wanted <= 0):
        return
    n = (wanted + 15) // 16
    k1_buf = gl.allocate_shared_memory(DTYPE, [STAGES, 64, D1], LINES)
    k2_buf = gl.allocate_shared_memory(DTYPE, [STAGES, 64, D2], LINES) if D2 > 0 else k1_buf
    q1_buf = gl.allocate_shared_memory(DTYPE, [16, 8, D1], TILES)
    q2_buf = gl.allocate_shared_memory(DTYPE, [16, 8, D2], TILES) if D2 > 0 else q1_buf
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    mbarrier.init(q_full, count=1)
    fence_async_shared()
    mbarrier.expect(q_full, 128 * D * 2)
    load_wide_queries(q1_desc, q2_desc, q1_buf, q2_buf, q_full, g * 16, start, D2)
    for i in gl.static_range(STAGES):
        _load(k1_desc, k2_desc, k1_buf, k2_buf, full, i, n, doc_cmp, g * D, D2, STAGES)
    q1 = q1_buf.reshape([128, D1])
    q2 = q2_buf.reshape([128, D2]) if D2 > 0 else q1
    column = gl.arange(0, 128, layout=gl.SliceLayout(0, S))
    token = start + column % 8
    lse = gl.load(
        lse_ptr + token.to(gl.int64) * Hq + g * 16 + column // 8, mask=token < end, other=float("inf")
    )  # fmt: skip
    block = gl.arange(0, 16, layout=gl.SliceLayout(1, BLOCK_TOKEN))[:, None]
    own = gl.arange(0, 8, layout=gl.SliceLayout(0, BLOCK_TOKEN))[None, :]
    slot = gl.expand_dims(gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, SUMMED))), 0), 2)
    weight = gl.where(slot == 3, 1.0, 2.0)
    seen = keys_seen(start - doc_start + gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(0, SUMMED))))
    seen = gl.expand_dims(gl.expand_dims(seen, 0), 0)
    key = gl.arange(0, 16, layout=gl.SliceLayout(1, gl.SliceLayout(2, SUMMED)))
    key = gl.expand_dims(gl.expand_dims(key, 1), 2) * 4 + slot
    out = scores + (piece.to(gl.int64) * (Hq // 16) + g) * blocks * 16
    zero = gl.zeros([64, 128], gl.float32, layout=S)
    mbarrier.wait(q_full, 0)
    mbarrier.wait(full.index(0), 0)
    s = _scores(k1_buf, k2_buf, q1, q2, 0, zero, D2)
    # Two tiles a round: a product in flight that has to change registers over the loop's edge would be serialised.
    for i in range(0, n, 2):
        done = warpgroup_mma_wait(0, deps=[s])
        t = _next(k1_desc, k2_desc, k1_buf, k2_buf, q1, q2, full, i, n, doc_cmp, g * D, zero, D2, STAGES)
        _emit(done, lse, scale, i, key, seen, slot, weight, block, own, out, wanted, SUMMED)
        done = warpgroup_mma_wait(0, deps=[t])
        s = _next(k1_desc, k2_desc, k1_buf, k2_buf, q1, q2, full, i + 1, n, doc_cmp, g * D, zero, D2, STAGES)
        _emit(done, lse, scale, i + 1, key, seen, slot, weight, block, own, out, wanted, SUMMED)
    warpgroup_mma_wait(0, deps=[s])


def importance(
    q: Tensor, k: Tensor, lse: Tensor, documents: Documents, spec: NSASpec, scale: float, scores: Tensor,
    first_piece: int,
) -> None:  # fmt: skip
    """`ops.select.importance` for what `takes` takes: writes scores [pieces, Hk, blocks, 8, 2]."""
    D = q.shape[2]
    table = documents.token_tiles(TOKEN_TILE)
    _importance_hopper[(len(scores), k.shape[1])](
        *head_major_descriptors(q, PIECE), *key_descriptors(k, 64), lse, scores, table, table.shape[1], first_piece,
        scores.shape[2], scale * LOG2E, Hq=q.shape[1], D=D, D2=max(D - 128, 0), LOCAL=spec.slc_local, STAGES=STAGES,
        SUMMED=SUMMED, num_warps=4,
    )  # fmt: skip


def select_blocks(q: Tensor, k: Tensor, lse: Tensor, documents: Documents, spec: NSASpec, scale: float) -> Tensor:
    """`ops.select.select_blocks` for what `takes` takes: int32 [T, Hk, n]."""
    return select.select_blocks(q, k, lse, documents, spec, scale, importance, PIECE)
