"""Selected attention for Hopper in Gluon: TMA, mbarriers and asynchronous wgmma. Same functions as `ops.selected`.

Forward and dQ load a block for 8 tokens and compute it for 4, which plain Triton cannot say: its products span all
warps of a program. That is what makes them faster; `ops.selected_tiles_hopper` has the walk, docs/kernels/selected.md
the log.
"""

from __future__ import annotations

import torch
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
from nsa_train.ops.gluon_names import barrier
from nsa_train.ops.reference import NSASpec
from nsa_train.ops.selected_hopper_bwd import backward
from nsa_train.ops.selected_plan import unions
from nsa_train.ops.selected_tiles_hopper import BLOCK, STAGES, produce_blocks, work_item
from nsa_train.ops.tiles import LOG2E
from nsa_train.ops.tiles_hopper import (
    PIECE,
    PIECES,
    key_descriptors,
    load_wide_queries,
    programs,
    query_descriptors,
    scores,
    takes_heads,
)

__all__ = ["backward", "forward", "takes"]


def takes(q: Tensor, k: Tensor, v: Tensor, spec: NSASpec) -> bool:
    """Whether selected attention runs for q [T, Hq, D], k [T, Hk, D], v [T, Hk, Dv]; scale must be positive."""
    return takes_heads(q, v) and spec.slc_block == BLOCK


@gluon.jit
def _consume(
    HALF: gl.constexpr, q1_desc, q2_desc, o_ptr, lse_ptr, q1_buf, q2_buf, k1_buf, k2_buf, v_buf, q_full, full, empty,
    table, entries, counts, M, scale,
    Hk: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, D2: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Tokens 4 HALF ... 4 HALF + 3 of each tile: 64 rows, row = 16 token + head."""
    DTYPE: gl.constexpr = q1_buf.dtype
    Hq: gl.constexpr = 16 * Hk
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    q1 = q1_buf.index(HALF).reshape([64, D - D2])
    q2 = q2_buf.index(HALF).reshape([64, D2]) if D2 > 0 else q1
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    steps = 0
    items = 0
    for item in range(gl.program_id(0), M * 8 * Hk, gl.num_programs(0)):
        g, start, end, doc_start = work_item(table, M, item)
        if start < end:
            barrier()  # all warps are done with the last tile's queries
            mbarrier.expect(q_full.index(HALF), 64 * D * 2)
            load_wide_queries(
                q1_desc, q2_desc, q1_buf.index(HALF), q2_buf.index(HALF), q_full.index(HALF), start + 4 * HALF, g * 16,
                D2,
            )  # fmt: skip
            n = gl.load(counts + item)
            union = entries + item * (8 * N)
            entry = gl.load(union)
            token = start + 4 * HALF + row // 16
            m = gl.full([64], -1.0e30, gl.float32, layout=gl.SliceLayout(1, S))
            total = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, S))
            o = gl.zeros([64, DV], gl.float32, layout=SUMS)
            mbarrier.wait(q_full.index(HALF), items & 1)
            for i in range(n):
                following = gl.load(union + i + 1, mask=i + 1 < n, other=0)
                stage = steps % STAGES
                mbarrier.wait(full.index(stage), (steps // STAGES) & 1)  # also to skip: the phases stay in step
                if ((entry >> (4 * HALF)) & 15) != 0:
                    zero = gl.zeros([64, 64], gl.float32, layout=S)
                    s = scores(q1, q2, k1_buf.index(stage), k2_buf.index(stage), zero, D2)
                    s = warpgroup_mma_wait(0, deps=(s,))
                    chose = ((entry >> (4 * HALF + row // 16)) & 1) == 1
                    s = gl.where(chose[:, None], s * scale, float("-inf"))
                    if i == n - 1:  # the tile's own block is the last of its union
                        key = doc_start + (entry >> 8) * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, S))
                        s = gl.where(key[None, :] <= token[:, None], s, float("-inf"))
                    new = gl.maximum(m, gl.max(s, 1))
                    shrink = gl.exp2(m - new)
                    p = gl.exp2(s - new[:, None])
                    total = total * shrink + gl.sum(p, 1)
                    m = new
                    o = o * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None]
                    o = warpgroup_mma(gl.convert_layout(p.to(DTYPE), P), v_buf.index(stage), o, is_async=True)
                    o = warpgroup_mma_wait(0, deps=(o,))
                mbarrier.arrive(empty.index(stage), count=1)
                entry = following
                steps += 1
            nothing = total == 0.0
            at = token.to(gl.int64) * Hq + g * 16 + row % 16
            gl.store(lse_ptr + at, gl.where(nothing, float("inf"), m + gl.log2(total)), mask=token < end)
            o = o * gl.convert_layout(gl.where(nothing, 0.0, 1.0 / total), gl.SliceLayout(1, SUMS))[:, None]
            at = gl.convert_layout(at, gl.SliceLayout(1, SUMS)) * DV
            column = gl.arange(0, DV, layout=gl.SliceLayout(0, SUMS))
            there = gl.convert_layout(token, gl.SliceLayout(1, SUMS)) < end
            gl.store(o_ptr + at[:, None] + column[None, :], o.to(DTYPE), mask=there[:, None])
            items += 1


@gluon.jit
def _selected_fwd_hopper(
    q1_desc, q2_desc, k1_desc, k2_desc, v_desc,
    o_ptr,    # [T, Hq, Dv]
    lse_ptr,  # [T, Hq]  fp32, base 2, +inf where nothing is seen
    table,    # [6, M]
    entries,  # [Hk, TILES, 8 * n]
    counts,   # [Hk, TILES]
    M, scale,
    Hk: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, D2: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = q1_desc.dtype
    D1: gl.constexpr = D - D2
    LINES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    TILES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q1_buf = gl.allocate_shared_memory(DTYPE, [2, 4, 16, D1], TILES)
    q2_buf = gl.allocate_shared_memory(DTYPE, [2, 4, 16, D2], TILES) if D2 > 0 else q1_buf
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
        (_consume, (0, q1_desc, q2_desc, o_ptr, lse_ptr, q1_buf, q2_buf, k1_buf, k2_buf, v_buf, q_full, full, empty,
                    table, entries, counts, M, scale, Hk, D, DV, D2, N, STAGES)),
        (_consume, (1, q1_desc, q2_desc, o_ptr, lse_ptr, q1_buf, q2_buf, k1_buf, k2_buf, v_buf, q_full, full, empty,
                    table, entries, counts, M, scale, Hk, D, DV, D2, N, STAGES)),
        (produce_blocks, (k1_desc, k2_desc, v_desc, k1_buf, k2_buf, v_buf, full, empty, table, entries, counts, M, Hk,
                          D, DV, D2, N, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, documents: Documents, spec: NSASpec, scale: float
) -> tuple[Tensor, Tensor]:
    """`ops.selected.forward` for what `takes` takes: (o [T, Hq, Dv], lse fp32 [T, Hq])."""
    T, Hq, D = q.shape
    Hk, Dv = v.shape[1:]
    o = torch.empty(T, Hq, Dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(T, Hq, dtype=torch.float32, device=q.device)
    union = unions(blocks, documents, spec, PIECE, by_block=False)
    table = documents.token_tiles(TOKEN_TILE)
    M = table.shape[1]
    _selected_fwd_hopper[(min(programs(q.device), M * PIECES * Hk),)](
        *query_descriptors(q, 4), *key_descriptors(k, BLOCK), key_descriptors(v, BLOCK)[0], o, lse, table,
        union.entries, union.counts, M, scale * LOG2E,
        Hk=Hk, D=D, DV=Dv, D2=max(D - 128, 0), N=spec.slc_count, STAGES=STAGES, num_warps=4, maxnreg=168,
    )  # fmt: skip
    return o, lse
