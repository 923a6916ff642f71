"""Gradients of the sliding window for Hopper in Gluon. Same function as `ops.window.backward`.

dQ      the frame of the forward, persistent: one TMA warp, two consumer warpgroups of 64 rows.
dK, dV  a program owns 128 keys of one document times one KV head and walks the tokens that see them, 4 at a time,
        newest first, in one partition of 8 warps: the accumulators leave no registers for a producer warp. Scores are
        transposed, [keys, rows]. The step is that of the compressed branch with the window's masks: V dO^T and dV are
        issued together, TMA refills and dS run under them; then K Q^T of the next tile and dK together, the next
        exponentials under dK. Only the first tile may reach over the document's end. One loop masks every tile: loops
        for the unmasked ones save nothing and spill.
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
from nsa_train.ops.gluon_names import barrier, tma_load
from nsa_train.ops.reference import NSASpec
from nsa_train.ops.tiles import LOG2E
from nsa_train.ops.tiles_hopper import (
    PIECES,
    add_dq,
    dkv_products,
    fill_gradients,
    fill_queries,
    key_descriptors,
    load_wide,
    load_wide_queries,
    pack_halves,
    programs,
    query_descriptors,
    row_descriptor,
    score_columns,
    scores,
    store_dq,
    transposed_scores,
    wide_arrive,
)
from nsa_train.ops.window_tiles_hopper import TAIL, work_item

DQ_KEYS = 64  # keys in a step of dQ
STAGES = 2  # of K and V in dQ
DKV_KEYS = 128


@gluon.jit
def _dq_produce(
    q1_desc, q2_desc, do_desc, k1_desc, k2_desc, v_desc, k1_tail_desc, k2_tail_desc, v_tail_desc, q1_buf, q2_buf,
    do_buf, k1_buf, k2_buf, v_buf, k1_tail, k2_tail, v_tail, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    tail_full, tail_empty, table, M, first, step, Hk: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, D2: gl.constexpr,
    W: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    items = first * 0
    tails = first * 0
    tiles = first * 0
    for item in range(first, M * 8 * Hk, step):
        g, start, end, _doc_start, n, _n_inside, tail = work_item(table, M, item, Hk, W, KEYS)
        for w in gl.static_range(2):
            mbarrier.wait(q_empty.index(w), (items & 1) ^ 1)
            mbarrier.expect(q_full.index(w), 64 * (D + DV) * 2)
            load_wide_queries(
                q1_desc, q2_desc, q1_buf.index(w), q2_buf.index(w), q_full.index(w), start + w * 4, g * 16, D2
            )
            tma_load(do_desc, [start + w * 4, g * 16, 0], q_full.index(w), do_buf.index(w))
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
def _dq_tile(
    dq1, dq2, q1, q2, do, k1, k2, v, k_full, v_full, phase, lse, delta, token, oldest, key, scale,
    D2: gl.constexpr, KEYS: gl.constexpr, S: gl.constexpr, P1: gl.constexpr, P2: gl.constexpr,
):  # fmt: skip
    """dQ += dS K over the keys from `key` on."""
    zero = gl.zeros([64, KEYS], gl.float32, layout=S)
    mbarrier.wait(k_full, phase)
    s = scores(q1, q2, k1, k2, zero, D2)
    mbarrier.wait(v_full, phase)
    dp = warpgroup_mma(do, v.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    p = gl.exp2(s * scale - lse[:, None])
    at = (key + gl.arange(0, KEYS, layout=gl.SliceLayout(0, S)))[None, :]
    p = gl.where((at >= oldest[:, None]) & (at <= token[:, None]), p, 0.0)
    dp = warpgroup_mma_wait(0, deps=[dp])
    ds = (p * (dp - delta[:, None])).to(k1.dtype)
    return add_dq(dq1, dq2, ds, k1, k2, P1, P2, D2)


@gluon.jit
def _dq_consume(
    HALF: gl.constexpr, lse_ptr, delta_ptr, dq_ptr, q1_buf, q2_buf, do_buf, k1_buf, k2_buf, v_buf, k1_tail, k2_tail,
    v_tail, q_full, q_empty, k_full, k_empty, v_full, v_empty, tail_full, tail_empty, table, M, first, step, scale,
    dq_scale, Hk: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, D2: gl.constexpr, W: gl.constexpr,
    KEYS: gl.constexpr, STAGES: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """Tokens 4 HALF ... 4 HALF + 3 of each piece: 64 rows, row = 16 token + head."""
    D1: gl.constexpr = D - D2
    Hq: gl.constexpr = 16 * Hk
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    TS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 16, 16])
    A1: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D1, 16])
    A2: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    P1: gl.constexpr = gl.DotOperandLayout(0, A1, 2)
    P2: gl.constexpr = gl.DotOperandLayout(0, A2, 2)
    T_ROWS: gl.constexpr = gl.SliceLayout(1, TS)
    q1 = q1_buf.index(HALF).reshape([64, D1])
    q2 = q2_buf.index(HALF).reshape([64, D2]) if D2 > 0 else q1
    do = do_buf.index(HALF).reshape([64, DV])
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    items = first * 0
    tails = first * 0
    tiles = first * 0
    for item in range(first, M * 8 * Hk, step):
        g, start, end, doc_start, n, _n_inside, tail = work_item(table, M, item, Hk, W, KEYS)
        token = start + HALF * 4 + row // 16
        oldest = gl.maximum(token - (W - 1), doc_start)
        at = token.to(gl.int64) * Hq + g * 16 + row % 16
        lse = gl.load(lse_ptr + at, mask=token < end, other=float("inf"))
        delta = gl.load(delta_ptr + at, mask=token < end, other=0.0)
        dq1 = gl.zeros([64, D1], gl.float32, layout=A1)
        dq2 = gl.zeros([64, 64], gl.float32, layout=A2)
        mbarrier.wait(q_full.index(HALF), items & 1)
        for _ in range(tail):
            dq1, dq2 = _dq_tile(
                dq1, dq2, q1, q2, do, k1_tail, k2_tail, v_tail, tail_full, tail_full, tails & 1,
                gl.convert_layout(lse, T_ROWS), gl.convert_layout(delta, T_ROWS),
                gl.convert_layout(token, T_ROWS), gl.convert_layout(oldest, T_ROWS), end - W - 16, scale,
                D2, 16, TS, P1, P2,
            )  # fmt: skip
            mbarrier.arrive(tail_empty, count=1)
        for j in range(n):
            stage = (tiles + j) % STAGES
            dq1, dq2 = _dq_tile(
                dq1, dq2, q1, q2, do, k1_buf.index(stage), k2_buf.index(stage), v_buf.index(stage),
                k_full.index(stage), v_full.index(stage), ((tiles + j) // STAGES) & 1,
                lse, delta, token, oldest, end - (j + 1) * KEYS, scale, D2, KEYS, S, P1, P2,
            )  # fmt: skip
            mbarrier.arrive(v_empty.index(stage), count=1)
            mbarrier.arrive(k_empty.index(stage), count=1)
        mbarrier.arrive(q_empty.index(HALF), count=1)
        store_dq(dq_ptr, dq1 * dq_scale, start + HALF * 4, end, g, Hq, D, 0, D1, A1, ADD)
        if D2 > 0:
            store_dq(dq_ptr, dq2 * dq_scale, start + HALF * 4, end, g, Hq, D, D1, D2, A2, ADD)
        items += 1
        tails += tail
        tiles += n


@gluon.jit
def _win_dq_hopper(
    q1_desc, q2_desc, do_desc, k1_desc, k2_desc, v_desc, k1_tail_desc, k2_tail_desc, v_tail_desc,
    lse_ptr,    # [T, Hq]     fp32
    delta_ptr,  # [T, Hq]     fp32
    dq_ptr,     # [T, Hq, D]  written, or added to
    table,      # [6, M]      int32
    M, scale, dq_scale,
    Hk: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, D2: gl.constexpr, W: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = q1_desc.dtype
    D1: gl.constexpr = D - D2
    LINES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    TILES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q1_buf = gl.allocate_shared_memory(DTYPE, [2, 4, 16, D1], TILES)
    q2_buf = gl.allocate_shared_memory(DTYPE, [2, 4, 16, D2], TILES) if D2 > 0 else q1_buf
    do_buf = gl.allocate_shared_memory(DTYPE, [2, 4, 16, DV], TILES)
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
        (_dq_consume, (0, lse_ptr, delta_ptr, dq_ptr, q1_buf, q2_buf, do_buf, k1_buf, k2_buf, v_buf, k1_tail, k2_tail,
                       v_tail, q_full, q_empty, k_full, k_empty, v_full, v_empty, tail_full, tail_empty, table, M,
                       first, step, scale, dq_scale, Hk, D, DV, D2, W, KEYS, STAGES, ADD)),
        (_dq_consume, (1, lse_ptr, delta_ptr, dq_ptr, q1_buf, q2_buf, do_buf, k1_buf, k2_buf, v_buf, k1_tail, k2_tail,
                       v_tail, q_full, q_empty, k_full, k_empty, v_full, v_empty, tail_full, tail_empty, table, M,
                       first, step, scale, dq_scale, Hk, D, DV, D2, W, KEYS, STAGES, ADD)),
        (_dq_produce, (q1_desc, q2_desc, do_desc, k1_desc, k2_desc, v_desc, k1_tail_desc, k2_tail_desc, v_tail_desc,
                       q1_buf, q2_buf, do_buf, k1_buf, k2_buf, v_buf, k1_tail, k2_tail, v_tail, q_full, q_empty, k_full,
                       k_empty, v_full, v_empty, tail_full, tail_empty, table, M, first, step, Hk, D, DV, D2, W, KEYS,
                       STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip


@gluon.jit
def _probabilities(
    s, token, end, lse_buf, start, stage, scale, W: gl.constexpr, S: gl.constexpr, COLUMNS: gl.constexpr,
    HALF: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    """Packed P of the 4 tokens from `token` and the 128 keys from `start`; RAGGED: tokens may lie behind `end`."""
    p = gl.exp2(s * scale - score_columns(lse_buf, stage, S, COLUMNS)[None, :])
    t = token + gl.arange(0, 64, layout=gl.SliceLayout(0, S)) // 16
    key = start + gl.arange(0, 128, layout=gl.SliceLayout(1, S))
    age = (t[None, :] - key[:, None]).to(gl.uint32)  # a key in the future is older than any window
    p = gl.where(age < W, p, 0.0)
    if RAGGED:
        p = gl.where((t < end)[None, :], p, 0.0)
    return pack_halves(p, HALF)


@gluon.jit
def _dkv_step(
    token, q_stage, phase, j, p, dk1, dk2, dv, k1_buf, k2_buf, v_buf, q1_buf, q2_buf, do_buf, lse_buf, delta_buf,
    q_full, do_full, q1_desc, q2_desc, do_desc, lse_desc, delta_desc, start, g, scale, zero,
    D: gl.constexpr, DV: gl.constexpr, D2: gl.constexpr, W: gl.constexpr, S: gl.constexpr, COLUMNS: gl.constexpr,
    P1: gl.constexpr, P2: gl.constexpr, PV: gl.constexpr,
):  # fmt: skip
    """The 4 tokens from `token`. Enters with their P and nothing in flight; leaves with P of the 4 before them.

    Arguments as of `dkv_products`.
    """
    HALF: gl.constexpr = q1_buf.dtype
    next_stage, s, dv, x1, x2 = dkv_products(
        token, q_stage, phase, j, p, dk1, dk2, dv, k1_buf, k2_buf, v_buf, q1_buf, q2_buf, do_buf, lse_buf, delta_buf,
        q_full, do_full, q1_desc, q2_desc, do_desc, lse_desc, delta_desc, start, 0, g, zero, D, DV, D2, S,
        COLUMNS, P1, P2, PV,
    )  # fmt: skip
    p = _probabilities(s, token - 4, 0, lse_buf, start, next_stage, scale, W, S, COLUMNS, HALF, False)
    dk1, dk2 = wide_arrive(x1, x2, D2)
    phase = gl.where(next_stage == 2, phase ^ 1, phase)
    barrier()
    return next_stage, phase, j + 1, p, dk1, dk2, dv


@gluon.jit
def _store(
    ptr, x, start, keys_end, g, Hk: gl.constexpr, FIRST: gl.constexpr, TOTAL: gl.constexpr, WIDTH: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    key = start + gl.arange(0, 128, layout=gl.SliceLayout(1, LAYOUT))
    at = (key.to(gl.int64) * Hk + g) * TOTAL + FIRST
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    gl.store(ptr + at[:, None] + column[None, :], x.to(ptr.dtype.element_ty), mask=(key < keys_end)[:, None])


@gluon.jit
def _win_dkv_hopper(
    q1_desc, q2_desc, do_desc, lse_desc, delta_desc, k1_desc, k2_desc, v_desc,
    dk_ptr,  # [T, Hk, D]
    dv_ptr,  # [T, Hk, Dv]
    table,   # [6, M]  int32, tiles of 128 tokens
    M, scale, dk_scale,
    Hk: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, D2: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = q1_desc.dtype
    D1: gl.constexpr = D - D2
    LINES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    TILES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    ROWS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 64, 16])
    A1: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, D1, 16])
    AV: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, DV, 16])
    # columns of a score tile as the accumulator holds them: no register moves when lse and delta come in
    COLUMNS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 8], [1, 0], [2, 0]], [[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]], [[0, 0], [0, 0], [0, 0]], [],
        [4, 16],
    )  # fmt: skip
    P1: gl.constexpr = gl.DotOperandLayout(0, A1, 2)
    P2: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    PV: gl.constexpr = gl.DotOperandLayout(0, AV, 2)
    tile = table + gl.program_id(0) // Hk
    g = gl.program_id(0) % Hk
    start = gl.load(tile)
    keys_end = gl.load(tile + M)
    end = gl.minimum(keys_end - 1 + W, gl.load(tile + 3 * M))
    if start >= keys_end:
        return
    last = start + (end - 1 - start) // 4 * 4
    k1_buf = gl.allocate_shared_memory(HALF, [128, D1], LINES)
    k2_buf = gl.allocate_shared_memory(HALF, [128, D2], LINES) if D2 > 0 else k1_buf
    v_buf = gl.allocate_shared_memory(HALF, [128, DV], LINES)
    q1_buf = gl.allocate_shared_memory(HALF, [3, 4, 16, D1], TILES)
    q2_buf = gl.allocate_shared_memory(HALF, [3, 4, 16, D2], TILES) if D2 > 0 else q1_buf
    do_buf = gl.allocate_shared_memory(HALF, [2, 4, 16, DV], TILES)
    lse_buf = gl.allocate_shared_memory(gl.float32, [3, 4, 16], ROWS)
    delta_buf = gl.allocate_shared_memory(gl.float32, [2, 4, 16], ROWS)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [3, 1], BARRIER)
    do_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(3):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(do_full.index(i), count=1)
    fence_async_shared()
    barrier()
    mbarrier.expect(kv_full, 128 * (D + DV) * 2)
    load_wide(k1_desc, k2_desc, k1_buf, k2_buf, kv_full, start, g * D, D2)
    tma_load(v_desc, [start, g * DV], kv_full, v_buf)
    for i in gl.static_range(2):
        fill_queries(
            q1_desc, q2_desc, lse_desc, q1_buf, q2_buf, lse_buf, q_full, i, last - 4 * i, g,
            last - 4 * i >= start, D, D2,
        )  # fmt: skip
    fill_gradients(do_desc, delta_desc, do_buf, delta_buf, do_full, 0, last, g, True, DV)
    zero = gl.zeros([128, 64], gl.float32, layout=S)
    dk1 = gl.zeros([128, D1], gl.float32, layout=A1)
    dk2 = gl.zeros([128, 64], gl.float32, layout=S)
    dv = gl.zeros([128, DV], gl.float32, layout=AV)
    mbarrier.wait(kv_full, 0)
    mbarrier.wait(q_full.index(0), 0)
    s = warpgroup_mma_wait(0, deps=[transposed_scores(k1_buf, k2_buf, q1_buf, q2_buf, 0, zero, D1, D2)])
    p = _probabilities(s, last, end, lse_buf, start, 0, scale, W, S, COLUMNS, HALF, True)
    stage = start * 0
    phase = start * 0
    j = start * 0
    for i in range((last - start) // 4 + 1):
        stage, phase, j, p, dk1, dk2, dv = _dkv_step(
            last - 4 * i, stage, phase, j, p, dk1, dk2, dv, k1_buf, k2_buf, v_buf, q1_buf, q2_buf, do_buf, lse_buf,
            delta_buf, q_full, do_full, q1_desc, q2_desc, do_desc, lse_desc, delta_desc, start, g, scale, zero,
            D, DV, D2, W, S, COLUMNS, P1, P2, PV,
        )  # fmt: skip
    _store(dk_ptr, dk1 * dk_scale, start, keys_end, g, Hk, 0, D, D1, A1)
    if D2 > 0:
        _store(dk_ptr, dk2 * dk_scale, start, keys_end, g, Hk, D1, D, D2, S)
    _store(dv_ptr, dv, start, keys_end, g, Hk, 0, DV, DV, AV)


def backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, documents: Documents, spec: NSASpec,
    scale: float, dq: Tensor, accumulate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ops.window.backward` for what `takes` takes: writes or adds to dq, gives (dk, dv)."""
    D = q.shape[2]
    Hk, Dv = v.shape[1:]
    table = documents.token_tiles(TOKEN_TILE)
    _win_dq_hopper[(min(programs(q.device), table.shape[1] * PIECES * Hk),)](
        *query_descriptors(q, 4), query_descriptors(do, 4)[0], *key_descriptors(k, DQ_KEYS),
        key_descriptors(v, DQ_KEYS)[0], *key_descriptors(k, TAIL), key_descriptors(v, TAIL)[0], lse, delta, dq, table,
        table.shape[1], scale * LOG2E, scale, Hk=Hk, D=D, DV=Dv, D2=max(D - 128, 0), W=spec.window, KEYS=DQ_KEYS,
        STAGES=STAGES, ADD=accumulate, num_warps=4,
    )  # fmt: skip
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    table = documents.token_tiles(DKV_KEYS)
    _win_dkv_hopper[(table.shape[1] * Hk,)](
        *query_descriptors(q, 4), query_descriptors(do, 4)[0], row_descriptor(lse, 4), row_descriptor(delta, 4),
        *key_descriptors(k, DKV_KEYS), key_descriptors(v, DKV_KEYS)[0], dk, dv, table, table.shape[1], scale * LOG2E,
        scale, Hk=Hk, D=D, DV=Dv, D2=max(D - 128, 0), W=spec.window, num_warps=8,
    )  # fmt: skip
    return dk, dv
