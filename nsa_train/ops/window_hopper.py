"""Sliding window for Hopper in Gluon: TMA, mbarriers and asynchronous wgmma. Same functions as `ops.window`.

Forward and dQ are persistent: a program per multiprocessor walks over the work items (a piece of 8 tokens of one
document, a KV head), because an item alone is too short to hide its start and its end. One TMA warp runs ahead into
the next item; two consumer warpgroups own 4 tokens times 16 heads each, 64 rows.

The keys of an item end where its tokens end. A narrow tile of 16 keys before the window's whole tiles serves the older
tokens: 528 keys instead of 576 or 640. It comes first, then the whole tiles, newest first, so that Q is free for the
next item while the last product and the stores run. Only the newest tile needs the causal mask, and tiles that reach
before the document's start. Loops with 0 or 1 trips stand for branches: a branch around a wgmma serialises them all.
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
from nsa_train.ops.gluon_names import tma_load
from nsa_train.ops.reference import NSASpec
from nsa_train.ops.tiles import LOG2E
from nsa_train.ops.tiles_hopper import (
    PIECES,
    key_descriptors,
    load_wide,
    load_wide_queries,
    programs,
    query_descriptors,
    scores,
    takes_heads,
)
from nsa_train.ops.window_hopper_bwd import backward
from nsa_train.ops.window_tiles_hopper import TAIL, work_item

__all__ = ["backward", "forward", "takes"]

STAGES = 2  # of K and V


def takes(q: Tensor, k: Tensor, v: Tensor, spec: NSASpec) -> bool:
    """Whether the window runs for q [T, Hq, D], k [T, Hk, D], v [T, Hk, Dv]; scale must be positive."""
    return takes_heads(q, v) and spec.window % 64 == 0


@gluon.jit
def _produce(
    q1_desc, q2_desc, k1_desc, k2_desc, v_desc, k1_tail_desc, k2_tail_desc, v_tail_desc, q1_buf, q2_buf, k1_buf, k2_buf,
    v_buf, k1_tail, k2_tail, v_tail, q_full, q_empty, k_full, k_empty, v_full, v_empty, tail_full, tail_empty, table, M,
    first, step, Hk: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, D2: gl.constexpr, W: gl.constexpr,
    KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    items = first * 0
    tails = first * 0
    tiles = first * 0
    for item in range(first, M * 8 * Hk, step):
        g, start, end, _doc_start, n, _n_inside, tail = work_item(table, M, item, Hk, W, KEYS)
        for w in gl.static_range(2):
            mbarrier.wait(q_empty.index(w), (items & 1) ^ 1)
            mbarrier.expect(q_full.index(w), 64 * D * 2)
            load_wide_queries(
                q1_desc, q2_desc, q1_buf.index(w), q2_buf.index(w), q_full.index(w), start + w * 4, g * 16, D2
            )
        for _ in range(tail):
            mbarrier.wait(tail_empty, (tails & 1) ^ 1)
            mbarrier.expect(tail_full, 16 * (D + DV) * 2)
            load_wide(k1_tail_desc, k2_tail_desc, k1_tail, k2_tail, tail_full, end - W - 16, g * D, D2)
            tma_load(v_tail_desc, [end - W - 16, g * DV], tail_full, v_tail)
        for i in range(n):
            row = end - (i + 1) * KEYS
            stage = (tiles + i) % STAGES
            phase = ((tiles + i) // STAGES) & 1
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_full.index(stage), KEYS * D * 2)
            load_wide(k1_desc, k2_desc, k1_buf.index(stage), k2_buf.index(stage), k_full.index(stage), row, g * D, D2)
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            mbarrier.expect(v_full.index(stage), KEYS * DV * 2)
            tma_load(v_desc, [row, g * DV], v_full.index(stage), v_buf.index(stage))
        items += 1
        tails += tail
        tiles += n


@gluon.jit
def _softmax(
    s, m, total, token, oldest, key, scale, KEYS: gl.constexpr, S: gl.constexpr, MASK: gl.constexpr
):  # fmt: skip
    """(p, what the sums so far shrink by, maximum, total) with the keys from `key` on taken in."""
    if MASK:
        at = (key + gl.arange(0, KEYS, layout=gl.SliceLayout(0, S)))[None, :]
        visible = (at >= oldest[:, None]) & (at <= token[:, None])
        s = gl.where(visible, s, -1.0e30)
    new = gl.maximum(m, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - new[:, None])
    if MASK:
        p = gl.where(visible, p, 0.0)
    shrink = gl.exp2(m - new)
    return p, shrink, new, total * shrink + gl.sum(p, 1)


@gluon.jit
def _round(
    tile, key, o, m, total, p, q1, q2, k1_buf, k2_buf, v_buf, k_full, k_empty, v_full, v_empty, zero, token, oldest,
    scale,
    D2: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, S: gl.constexpr, SUMS: gl.constexpr, P: gl.constexpr,
    MASK: gl.constexpr,
):  # fmt: skip
    """Enters with p of the tile before `tile`, counted over all items; leaves with p of this one, o without it."""
    stage = tile % STAGES
    mbarrier.wait(k_full.index(stage), (tile // STAGES) & 1)
    s = scores(q1, q2, k1_buf.index(stage), k2_buf.index(stage), zero, D2)
    v_stage = (tile - 1) % STAGES
    mbarrier.wait(v_full.index(v_stage), ((tile - 1) // STAGES) & 1)
    o_next = warpgroup_mma(p, v_buf.index(v_stage), o, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_empty.index(stage), count=1)
    p_wide, shrink, m, total = _softmax(s, m, total, token, oldest, key, scale, KEYS, S, MASK)
    o = warpgroup_mma_wait(0, deps=[o_next])
    mbarrier.arrive(v_empty.index(v_stage), count=1)
    o = o * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None]
    return o, m, total, gl.convert_layout(p_wide.to(v_buf.dtype), P)


@gluon.jit
def _consume(
    HALF: gl.constexpr, o_ptr, lse_ptr, q1_buf, q2_buf, k1_buf, k2_buf, v_buf, k1_tail, k2_tail, v_tail,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, tail_full, tail_empty, table, M, first, step, scale,
    Hk: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, D2: gl.constexpr, W: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Tokens 4 HALF ... 4 HALF + 3 of each piece: 64 rows, row = 16 token + head."""
    DTYPE: gl.constexpr = q1_buf.dtype
    Hq: gl.constexpr = 16 * Hk
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    TS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 16, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S)
    T_ROWS: gl.constexpr = gl.SliceLayout(1, TS)
    q1 = q1_buf.index(HALF).reshape([64, D - D2])
    q2 = q2_buf.index(HALF).reshape([64, D2]) if D2 > 0 else q1
    zero = gl.zeros([64, KEYS], gl.float32, layout=S)
    row = gl.arange(0, 64, layout=S_ROWS)
    items = first * 0
    tails = first * 0
    tiles = first * 0
    for item in range(first, M * 8 * Hk, step):
        g, start, end, doc_start, n, n_inside, tail = work_item(table, M, item, Hk, W, KEYS)
        token = start + HALF * 4 + row // 16
        oldest = gl.maximum(token - (W - 1), doc_start)
        o = gl.zeros([64, DV], gl.float32, layout=SUMS)
        m = gl.full([64], -1.0e30, gl.float32, layout=S_ROWS)
        total = gl.zeros([64], gl.float32, layout=S_ROWS)
        mbarrier.wait(q_full.index(HALF), items & 1)
        for _ in range(tail):
            mbarrier.wait(tail_full, tails & 1)
            none = gl.zeros([64, 16], gl.float32, layout=TS)
            s_tail = warpgroup_mma_wait(0, deps=[scores(q1, q2, k1_tail, k2_tail, none, D2)])
            p_tail, shrink, m_tail, total_tail = _softmax(
                s_tail, gl.convert_layout(m, T_ROWS), gl.convert_layout(total, T_ROWS),
                gl.convert_layout(token, T_ROWS), gl.convert_layout(oldest, T_ROWS), end - W - 16, scale, 16, TS, True,
            )  # fmt: skip
            p_half = gl.convert_layout(p_tail.to(DTYPE), P)
            o = warpgroup_mma_wait(0, deps=[warpgroup_mma(p_half, v_tail, o, is_async=True)])
            mbarrier.arrive(tail_empty, count=1)
            m = gl.convert_layout(m_tail, S_ROWS)
            total = gl.convert_layout(total_tail, S_ROWS)
        stage = tiles % STAGES
        mbarrier.wait(k_full.index(stage), (tiles // STAGES) & 1)
        s = scores(q1, q2, k1_buf.index(stage), k2_buf.index(stage), zero, D2)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty.index(stage), count=1)
        p_wide, shrink, m, total = _softmax(s, m, total, token, oldest, end - KEYS, scale, KEYS, S, True)
        o = o * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None]
        p = gl.convert_layout(p_wide.to(DTYPE), P)
        unmasked = gl.maximum(n_inside, 1)
        for j in range(1, unmasked):
            o, m, total, p = _round(
                tiles + j, end - (j + 1) * KEYS, o, m, total, p, q1, q2, k1_buf, k2_buf, v_buf, k_full, k_empty,
                v_full, v_empty, zero, token, oldest, scale, D2, KEYS, STAGES, S, SUMS, P, False,
            )  # fmt: skip
        for j in range(unmasked, n):
            o, m, total, p = _round(
                tiles + j, end - (j + 1) * KEYS, o, m, total, p, q1, q2, k1_buf, k2_buf, v_buf, k_full, k_empty,
                v_full, v_empty, zero, token, oldest, scale, D2, KEYS, STAGES, S, SUMS, P, True,
            )  # fmt: skip
        mbarrier.arrive(q_empty.index(HALF), count=1)
        stage = (tiles + n - 1) % STAGES
        mbarrier.wait(v_full.index(stage), ((tiles + n - 1) // STAGES) & 1)
        o = warpgroup_mma_wait(0, deps=[warpgroup_mma(p, v_buf.index(stage), o, is_async=True)])
        mbarrier.arrive(v_empty.index(stage), count=1)
        at = token.to(gl.int64) * Hq + g * 16 + row % 16
        gl.store(lse_ptr + at, m + gl.log2(total), mask=token < end)
        o = o * gl.convert_layout(1.0 / total, gl.SliceLayout(1, SUMS))[:, None]
        at = gl.convert_layout(at, gl.SliceLayout(1, SUMS)) * DV
        column = gl.arange(0, DV, layout=gl.SliceLayout(0, SUMS))
        there = gl.convert_layout(token, gl.SliceLayout(1, SUMS)) < end
        gl.store(o_ptr + at[:, None] + column[None, :], o.to(DTYPE), mask=there[:, None])
        items += 1
        tails += tail
        tiles += n


@gluon.jit
def _win_fwd_hopper(
    q1_desc, q2_desc, k1_desc, k2_desc, v_desc, k1_tail_desc, k2_tail_desc, v_tail_desc,
    o_ptr,    # [T, Hq, Dv]
    lse_ptr,  # [T, Hq]  fp32, base 2
    table,    # [6, M]   int32
    M, scale,
    Hk: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, D2: gl.constexpr, W: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = q1_desc.dtype
    D1: gl.constexpr = D - D2
    LINES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    TILES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q1_buf = gl.allocate_shared_memory(DTYPE, [2, 4, 16, D1], TILES)
    q2_buf = gl.allocate_shared_memory(DTYPE, [2, 4, 16, D2], TILES) if D2 > 0 else q1_buf
    k1_buf = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, D1], LINES)
    k2_buf = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, D2], LINES) if D2 > 0 else k1_buf
    v_buf = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, DV], LINES)
    k1_tail = gl.allocate_shared_memory(DTYPE, [16, D1], LINES)
    k2_tail = gl.allocate_shared_memory(DTYPE, [16, D2], LINES) if D2 > 0 else k1_tail
    v_tail = gl.allocate_shared_memory(DTYPE, [16, DV], LINES)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    tail_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    tail_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    mbarrier.init(tail_full, count=1)
    mbarrier.init(tail_empty, count=2)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    first = gl.program_id(0)
    step = gl.num_programs(0)
    gl.warp_specialize([
        (_consume, (0, o_ptr, lse_ptr, q1_buf, q2_buf, k1_buf, k2_buf, v_buf, k1_tail, k2_tail, v_tail, q_full, q_empty,
                    k_full, k_empty, v_full, v_empty, tail_full, tail_empty, table, M, first, step, scale, Hk, D, DV,
                    D2, W, KEYS, STAGES)),
        (_consume, (1, o_ptr, lse_ptr, q1_buf, q2_buf, k1_buf, k2_buf, v_buf, k1_tail, k2_tail, v_tail, q_full, q_empty,
                    k_full, k_empty, v_full, v_empty, tail_full, tail_empty, table, M, first, step, scale, Hk, D, DV,
                    D2, W, KEYS, STAGES)),
        (_produce, (q1_desc, q2_desc, k1_desc, k2_desc, v_desc, k1_tail_desc, k2_tail_desc, v_tail_desc, q1_buf, q2_buf,
                    k1_buf, k2_buf, v_buf, k1_tail, k2_tail, v_tail, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    tail_full, tail_empty, table, M, first, step, Hk, D, DV, D2, W, KEYS, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, spec: NSASpec, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ops.window.forward` for what `takes` takes: (o [T, Hq, Dv], lse fp32 [T, Hq])."""
    T, Hq, D = q.shape
    Hk, Dv = v.shape[1:]
    o = torch.empty(T, Hq, Dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(T, Hq, dtype=torch.float32, device=q.device)
    table = documents.token_tiles(TOKEN_TILE)
    M = table.shape[1]
    keys = 128 if spec.window % 128 == 0 else 64
    _win_fwd_hopper[(min(programs(q.device), M * PIECES * Hk),)](
        *query_descriptors(q, 4), *key_descriptors(k, keys), key_descriptors(v, keys)[0],
        *key_descriptors(k, TAIL), key_descriptors(v, TAIL)[0], o, lse, table, M, scale * LOG2E,
        Hk=Hk, D=D, DV=Dv, D2=max(D - 128, 0), W=spec.window, KEYS=keys, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
    return o, lse
