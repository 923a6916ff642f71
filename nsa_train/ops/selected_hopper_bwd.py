"""Backward of selected attention for Hopper: dQ here, along the tiles' unions; dK and dV in `selected_hopper_dkv`."""

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

from nsa_train.ops.documents import TOKEN_TILE, Documents
from nsa_train.ops.gluon_names import barrier, tma_load
from nsa_train.ops.reference import NSASpec
from nsa_train.ops.selected_hopper_dkv import keys_backward
from nsa_train.ops.selected_plan import unions
from nsa_train.ops.selected_tiles_hopper import BLOCK, STAGES, produce_blocks, work_item
from nsa_train.ops.tiles import LOG2E
from nsa_train.ops.tiles_hopper import (
    PIECE,
    PIECES,
    add_dq,
    key_descriptors,
    load_wide_queries,
    programs,
    query_descriptors,
    scores,
    store_dq,
)


@gluon.jit
def _consume(
    HALF: gl.constexpr, q1_desc, q2_desc, do_desc, lse_ptr, delta_ptr, dq_ptr, q1_buf, q2_buf, do_buf, k1_buf, k2_buf,
    v_buf, q_full, full, empty, table, entries, counts, M, scale, dq_scale,
    Hk: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, D2: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    ADD: gl.constexpr,
):  # fmt: skip
    """Tokens 4 HALF ... 4 HALF + 3 of each tile: 64 rows, row = 16 token + head.

    dQ += dS K, dS = P (dO V^T - delta).
    """
    DTYPE: gl.constexpr = q1_buf.dtype
    Hq: gl.constexpr = 16 * Hk
    D1: gl.constexpr = D - D2
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    A1: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D1, 16])
    S1: gl.constexpr = gl.DotOperandLayout(0, A1, 2)
    S2: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    q1 = q1_buf.index(HALF).reshape([64, D1])
    q2 = q2_buf.index(HALF).reshape([64, D2]) if D2 > 0 else q1
    do = do_buf.index(HALF).reshape([64, DV])
    zero = gl.zeros([64, 64], gl.float32, layout=S)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    steps = 0
    items = 0
    for item in range(gl.program_id(0), M * 8 * Hk, gl.num_programs(0)):
        g, start, end, doc_start = work_item(table, M, item)
        if start < end:
            barrier()  # all warps are done with the last tile's queries
            mbarrier.expect(q_full.index(HALF), 64 * (D + DV) * 2)
            load_wide_queries(
                q1_desc, q2_desc, q1_buf.index(HALF), q2_buf.index(HALF), q_full.index(HALF), start + 4 * HALF, g * 16,
                D2,
            )  # fmt: skip
            tma_load(do_desc, [start + 4 * HALF, g * 16, 0], q_full.index(HALF), do_buf.index(HALF))
            n = gl.load(counts + item)
            union = entries + item * (8 * N)
            entry = gl.load(union)
            token = start + 4 * HALF + row // 16
            at = token.to(gl.int64) * Hq + g * 16 + row % 16
            lse = gl.load(lse_ptr + at, mask=token < end, other=float("inf"))
            delta = gl.load(delta_ptr + at, mask=token < end, other=0.0)
            dq1 = gl.zeros([64, D1], gl.float32, layout=A1)
            dq2 = gl.zeros([64, 64], gl.float32, layout=S)
            mbarrier.wait(q_full.index(HALF), items & 1)
            for i in range(n):
                following = gl.load(union + i + 1, mask=i + 1 < n, other=0)
                stage = steps % STAGES
                mbarrier.wait(full.index(stage), (steps // STAGES) & 1)  # also to skip: the phases stay in step
                if ((entry >> (4 * HALF)) & 15) != 0:
                    s = scores(q1, q2, k1_buf.index(stage), k2_buf.index(stage), zero, D2)
                    dp = warpgroup_mma(do, v_buf.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
                    s = warpgroup_mma_wait(1, deps=(s,))
                    chose = ((entry >> (4 * HALF + row // 16)) & 1) == 1
                    p = gl.exp2(s * scale - gl.where(chose, lse, float("inf"))[:, None])
                    if i == n - 1:  # the tile's own block is the last of its union
                        key = doc_start + (entry >> 8) * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, S))
                        p = gl.where(key[None, :] <= token[:, None], p, 0.0)
                    dp = warpgroup_mma_wait(0, deps=(dp,))
                    ds = (p * (dp - delta[:, None])).to(DTYPE)
                    dq1, dq2 = add_dq(dq1, dq2, ds, k1_buf.index(stage), k2_buf.index(stage), S1, S2, D2)
                mbarrier.arrive(empty.index(stage), count=1)
                entry = following
                steps += 1
            store_dq(dq_ptr, dq1 * dq_scale, start + 4 * HALF, end, g, Hq, D, 0, D1, A1, ADD)
            if D2 > 0:
                store_dq(dq_ptr, dq2 * dq_scale, start + 4 * HALF, end, g, Hq, D, D1, D2, S, ADD)
            items += 1


@gluon.jit
def _selected_dq_hopper(
    q1_desc, q2_desc, do_desc, k1_desc, k2_desc, v_desc,
    lse_ptr,    # [T, Hq]  fp32, lowered by log2 of the gate
    delta_ptr,  # [T, Hq]  fp32
    dq_ptr,     # [T, Hq, D]  written, or added to if ADD
    table,      # [6, M]
    entries,    # [Hk, TILES, 8 * n]
    counts,     # [Hk, TILES]
    M, scale, dq_scale,
    Hk: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, D2: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    ADD: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = q1_desc.dtype
    D1: gl.constexpr = D - D2
    LINES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    TILES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q1_buf = gl.allocate_shared_memory(DTYPE, [2, 4, 16, D1], TILES)
    q2_buf = gl.allocate_shared_memory(DTYPE, [2, 4, 16, D2], TILES) if D2 > 0 else q1_buf
    do_buf = gl.allocate_shared_memory(DTYPE, [2, 4, 16, DV], TILES)
    k1_buf = gl.allocate_shared_memory(DTYPE, [STAGES, 64, D1], LINES)
    k2_buf = gl.allocate_shared_memory(DTYPE, [STAGES, 64, D2], LINES) if D2 > 0 else k1_buf
    v_buf = gl.allocate_shared_memory(DTYPE, [STAGES, 64, DV], LINES)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize([
        (_consume, (0, q1_desc, q2_desc, do_desc, lse_ptr, delta_ptr, dq_ptr, q1_buf, q2_buf, do_buf, k1_buf, k2_buf,
                    v_buf, q_full, full, empty, table, entries, counts, M, scale, dq_scale, Hk, D, DV, D2, N, STAGES,
                    ADD)),
        (_consume, (1, q1_desc, q2_desc, do_desc, lse_ptr, delta_ptr, dq_ptr, q1_buf, q2_buf, do_buf, k1_buf, k2_buf,
                    v_buf, q_full, full, empty, table, entries, counts, M, scale, dq_scale, Hk, D, DV, D2, N, STAGES,
                    ADD)),
        (produce_blocks, (k1_desc, k2_desc, v_desc, k1_buf, k2_buf, v_buf, full, empty, table, entries, counts, M, Hk,
                          D, DV, D2, N, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip


def backward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, do: Tensor, lse: Tensor, delta: Tensor, documents: Documents,
    spec: NSASpec, scale: float, dq: Tensor, accumulate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ops.selected.backward` for what `takes` takes: writes or adds to dq, gives (dk, dv)."""
    D = q.shape[2]
    Hk, Dv = v.shape[1:]
    union = unions(blocks, documents, spec, PIECE, by_block=True)
    table = documents.token_tiles(TOKEN_TILE)
    M = table.shape[1]
    _selected_dq_hopper[(min(programs(q.device), M * PIECES * Hk),)](
        *query_descriptors(q, 4), query_descriptors(do, 4)[0], *key_descriptors(k, BLOCK),
        key_descriptors(v, BLOCK)[0], lse, delta, dq, table, union.entries, union.counts, M, scale * LOG2E, scale,
        Hk=Hk, D=D, DV=Dv, D2=max(D - 128, 0), N=spec.slc_count, STAGES=STAGES, ADD=accumulate, num_warps=4,
        maxnreg=168,
    )  # fmt: skip
    return keys_backward(q, k, v, union, do, lse, delta, documents, spec, scale)
