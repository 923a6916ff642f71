"""Gradients of the compressed branch for Hopper in Gluon. Same function as `ops.compressed.backward`.

dQ      the frame of the forward: one TMA warp, two consumer warpgroups of 64 rows. The schedule inside a warpgroup is
        simple: the other one fills the tensor cores.
dK, dV  a program owns 128 keys times one chunk of queries times one KV head, in one partition of 8 warps: 160
        accumulator registers a thread leave no room for a producer warp. Scores are transposed, [keys, rows]. A tile is
        4 tokens times 16 heads: V dO^T and dV are issued together, TMA refills and dS run under them; then K Q^T of the
        next tile and dK together, the next exponentials under dK. P is kept as packed halves only, for want of
        registers. The newest tile comes first: it may reach over the document's end, and only the first P is masked
        for that.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_train.ops.compressed import query_chunk, sum_partials
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
    keys_seen,
    load_wide,
    load_wide_queries,
    pack_halves,
    query_descriptors,
    row_descriptor,
    score_columns,
    scores,
    store_dq,
    token_piece,
    transposed_scores,
    wide_arrive,
)

DQ_KEYS = 64  # keys in a step of dQ
DQ_K_STAGES = 3  # 3 and 2: 13.0 ms at 64k; 2 and 2: 13.2-14.2; 3 and 3: 13.8
DQ_V_STAGES = 2
DKV_KEYS = 128


@gluon.jit
def _dq_produce(
    q1_desc, q2_desc, do_desc, k1_desc, k2_desc, v_desc, q1_buf, q2_buf, do_buf, k1_buf, k2_buf, v_buf,
    q_full, k_full, k_empty, v_full, v_empty, start, g, doc_cmp, n,
    D: gl.constexpr, DV: gl.constexpr, D2: gl.constexpr, KEYS: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    for w in gl.static_range(2):
        mbarrier.expect(q_full.index(w), 64 * (D + DV) * 2)
        load_wide_queries(
            q1_desc, q2_desc, q1_buf.index(w), q2_buf.index(w), q_full.index(w), start + w * 4, g * 16, D2
        )
        tma_load(do_desc, [start + w * 4, g * 16, 0], q_full.index(w), do_buf.index(w))
    for i in range(n):
        row = doc_cmp + i * KEYS
        k_stage = i % K_STAGES
        mbarrier.wait(k_empty.index(k_stage), ((i // K_STAGES) & 1) ^ 1)
        mbarrier.expect(k_full.index(k_stage), KEYS * D * 2)
        load_wide(k1_desc, k2_desc, k1_buf.index(k_stage), k2_buf.index(k_stage), k_full.index(k_stage), row, g * D, D2)
        v_stage = i % V_STAGES
        mbarrier.wait(v_empty.index(v_stage), ((i // V_STAGES) & 1) ^ 1)
        mbarrier.expect(v_full.index(v_stage), KEYS * DV * 2)
        tma_load(v_desc, [row, g * DV], v_full.index(v_stage), v_buf.index(v_stage))


@gluon.jit
def _dq_consume(
    W: gl.constexpr, lse_ptr, delta_ptr, dq_ptr, q1_buf, q2_buf, do_buf, k1_buf, k2_buf, v_buf,
    q_full, k_full, k_empty, v_full, v_empty, start, end, g, doc_start, n, scale, dq_scale,
    Hq: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, D2: gl.constexpr, KEYS: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """Tokens 4 W ... 4 W + 3 of the piece: 64 rows, row = 16 token + head."""
    DTYPE: gl.constexpr = q1_buf.dtype
    D1: gl.constexpr = D - D2
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    A1: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D1, 16])
    A2: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    P1: gl.constexpr = gl.DotOperandLayout(0, A1, 2)
    P2: gl.constexpr = gl.DotOperandLayout(0, A2, 2)
    q1 = q1_buf.index(W).reshape([64, D1])
    q2 = q2_buf.index(W).reshape([64, D2]) if D2 > 0 else q1
    do = do_buf.index(W).reshape([64, DV])
    zero = gl.zeros([64, KEYS], gl.float32, layout=S)
    dq1 = gl.zeros([64, D1], gl.float32, layout=A1)
    dq2 = gl.zeros([64, 64], gl.float32, layout=A2)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    token = start + W * 4 + row // 16
    at = token.to(gl.int64) * Hq + g * 16 + row % 16
    lse = gl.load(lse_ptr + at, mask=token < end, other=float("inf"))
    delta = gl.load(delta_ptr + at, mask=token < end, other=0.0)
    seen = keys_seen(token - doc_start)
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, S))
    mbarrier.wait(q_full.index(W), 0)
    for j in range(n):
        k_stage = j % K_STAGES
        v_stage = j % V_STAGES
        mbarrier.wait(k_full.index(k_stage), (j // K_STAGES) & 1)
        s = scores(q1, q2, k1_buf.index(k_stage), k2_buf.index(k_stage), zero, D2)
        mbarrier.wait(v_full.index(v_stage), (j // V_STAGES) & 1)
        dp = warpgroup_mma(do, v_buf.index(v_stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.exp2(s * scale - lse[:, None])
        dp = warpgroup_mma_wait(0, deps=[dp])
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        ds = p * (dp - delta[:, None])
        ds = gl.where(key[None, :] + j * KEYS < seen[:, None], ds, 0.0).to(DTYPE)
        dq1, dq2 = add_dq(dq1, dq2, ds, k1_buf.index(k_stage), k2_buf.index(k_stage), P1, P2, D2)
        mbarrier.arrive(k_empty.index(k_stage), count=1)
    store_dq(dq_ptr, dq1 * dq_scale, start + W * 4, end, g, Hq, D, 0, D1, A1, ADD)
    if D2 > 0:
        store_dq(dq_ptr, dq2 * dq_scale, start + W * 4, end, g, Hq, D, D1, D2, A2, ADD)


@gluon.jit
def _compressed_dq_hopper(
    q1_desc, q2_desc, do_desc, k1_desc, k2_desc, v_desc,
    lse_ptr,  # [T, Hq]  float32
    delta_ptr,  # [T, Hq]  float32
    dq_ptr,  # [T, Hq, D]  written, or added to
    table,  # [6, M]  int32
    M, scale, dq_scale,
    Hq: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, D2: gl.constexpr, KEYS: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = q1_desc.dtype
    LINES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    TILES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    g = gl.program_id(1)
    piece = gl.num_programs(0) - 1 - gl.program_id(0)
    start, end, doc_start, doc_cmp = token_piece(table, M, piece)
    if start >= end:
        return
    n = gl.maximum((keys_seen(end - 1 - doc_start) + KEYS - 1) // KEYS, 1)
    q1_buf = gl.allocate_shared_memory(DTYPE, [2, 4, 16, D - D2], TILES)
    q2_buf = gl.allocate_shared_memory(DTYPE, [2, 4, 16, D2], TILES) if D2 > 0 else q1_buf
    do_buf = gl.allocate_shared_memory(DTYPE, [2, 4, 16, DV], TILES)
    k1_buf = gl.allocate_shared_memory(DTYPE, [K_STAGES, KEYS, D - D2], LINES)
    k2_buf = gl.allocate_shared_memory(DTYPE, [K_STAGES, KEYS, D2], LINES) if D2 > 0 else k1_buf
    v_buf = gl.allocate_shared_memory(DTYPE, [V_STAGES, KEYS, DV], LINES)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BARRIER)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(K_STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
    for i in gl.static_range(V_STAGES):
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize([
        (_dq_consume, (0, lse_ptr, delta_ptr, dq_ptr, q1_buf, q2_buf, do_buf, k1_buf, k2_buf, v_buf, q_full, k_full,
                       k_empty, v_full, v_empty, start, end, g, doc_start, n, scale, dq_scale, Hq, D, DV, D2, KEYS,
                       K_STAGES, V_STAGES, ADD)),
        (_dq_consume, (1, lse_ptr, delta_ptr, dq_ptr, q1_buf, q2_buf, do_buf, k1_buf, k2_buf, v_buf, q_full, k_full,
                       k_empty, v_full, v_empty, start, end, g, doc_start, n, scale, dq_scale, Hq, D, DV, D2, KEYS,
                       K_STAGES, V_STAGES, ADD)),
        (_dq_produce, (q1_desc, q2_desc, do_desc, k1_desc, k2_desc, v_desc, q1_buf, q2_buf, do_buf, k1_buf, k2_buf,
                       v_buf, q_full, k_full, k_empty, v_full, v_empty, start, g, doc_cmp, n, D, DV, D2, KEYS,
                       K_STAGES, V_STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip


@gluon.jit
def _probabilities(
    s, position, end, lse_buf, first_key, stage, scale,
    S: gl.constexpr, COLUMNS: gl.constexpr, HALF: gl.constexpr, CAUSAL: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    """Packed P of the 4 tokens from `position`; RAGGED: they may lie behind the document's `end`."""
    p = gl.exp2(s * scale - score_columns(lse_buf, stage, S, COLUMNS)[None, :])
    if CAUSAL:
        place = position + gl.arange(0, 64, layout=gl.SliceLayout(0, S)) // 16
        seen = keys_seen(place)
        if RAGGED:
            seen = gl.where(place < end, seen, 0)
        key = first_key + gl.arange(0, 128, layout=gl.SliceLayout(1, S))
        p = gl.where(key[:, None] < seen[None, :], p, 0.0)
    return pack_halves(p, HALF)


@gluon.jit
def _dkv_step(
    position, q_stage, phase, j, p, dk1, dk2, dv, k1_buf, k2_buf, v_buf, q1_buf, q2_buf, do_buf, lse_buf, delta_buf,
    q_full, do_full, q1_desc, q2_desc, do_desc, lse_desc, delta_desc, first, doc_start, first_key, g, scale, zero,
    D: gl.constexpr, DV: gl.constexpr, D2: gl.constexpr, S: gl.constexpr, COLUMNS: gl.constexpr,
    P1: gl.constexpr, P2: gl.constexpr, PV: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """The tile at `position`. Enters with its P and nothing in flight; leaves with P of the tile 4 tokens before.

    Arguments as of `dkv_products`.
    """
    HALF: gl.constexpr = q1_buf.dtype
    next_stage, s, dv, x1, x2 = dkv_products(
        position, q_stage, phase, j, p, dk1, dk2, dv, k1_buf, k2_buf, v_buf, q1_buf, q2_buf, do_buf, lse_buf, delta_buf,
        q_full, do_full, q1_desc, q2_desc, do_desc, lse_desc, delta_desc, first, doc_start, g, zero, D, DV, D2, S,
        COLUMNS, P1, P2, PV,
    )  # fmt: skip
    p = _probabilities(s, position - 4, 0, lse_buf, first_key, next_stage, scale, S, COLUMNS, HALF, CAUSAL, False)
    dk1, dk2 = wide_arrive(x1, x2, D2)
    phase = gl.where(next_stage == 2, phase ^ 1, phase)
    barrier()
    return next_stage, phase, j + 1, p, dk1, dk2, dv


@gluon.jit
def _store_partial(
    partial, x, start, keys_end, Hk: gl.constexpr, W: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    row = gl.arange(0, 128, layout=gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    gl.store(partial + (row * (Hk * W))[:, None] + column[None, :], x, mask=(start + row < keys_end)[:, None])


@gluon.jit
def _compressed_dkv_hopper(
    q1_desc, q2_desc, do_desc, lse_desc, delta_desc, k1_desc, k2_desc, v_desc,
    partial,  # [chunks, C, Hk, D + Dv]  float32
    table,  # [6, M]  int32, tiles of keys
    M, C, CHUNK, scale, dk_scale,
    Hk: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, D2: gl.constexpr,
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
    tile = table + gl.program_id(0)  # key tiles run fastest: programs that read the same queries run together
    chunk = gl.program_id(1) // Hk
    g = gl.program_id(1) % Hk
    start = gl.load(tile)
    keys_end = gl.load(tile + M)
    doc_start = gl.load(tile + 2 * M)
    first_key = start - gl.load(tile + 4 * M)
    # positions [first, end) of the chunk see keys of this tile, and from all_from on they see all of them
    end = gl.minimum(gl.load(tile + 3 * M) - doc_start, (chunk + 1) * CHUNK)
    first = gl.maximum(first_key * 16 + 31, chunk * CHUNK) // 4 * 4
    if (first >= end) | (start >= keys_end):
        return
    all_from = gl.maximum(((keys_end - start + first_key - 1) * 16 + 31 + 3) // 4 * 4, first)
    last = (end - 1) // 4 * 4
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
            q1_desc, q2_desc, lse_desc, q1_buf, q2_buf, lse_buf, q_full, i, doc_start + last - 4 * i, g,
            last - 4 * i >= first, D, D2,
        )  # fmt: skip
    fill_gradients(do_desc, delta_desc, do_buf, delta_buf, do_full, 0, doc_start + last, g, True, DV)
    zero = gl.zeros([128, 64], gl.float32, layout=S)
    dk1 = gl.zeros([128, D1], gl.float32, layout=A1)
    dk2 = gl.zeros([128, 64], gl.float32, layout=S)
    dv = gl.zeros([128, DV], gl.float32, layout=AV)
    mbarrier.wait(kv_full, 0)
    mbarrier.wait(q_full.index(0), 0)
    s = warpgroup_mma_wait(0, deps=[transposed_scores(k1_buf, k2_buf, q1_buf, q2_buf, 0, zero, D1, D2)])
    p = _probabilities(s, last, end, lse_buf, first_key, 0, scale, S, COLUMNS, HALF, True, True)
    stage = last * 0
    phase = last * 0
    j = last * 0
    steps = (last - first) // 4 + 1
    unmasked = gl.maximum(last - all_from, 0) // 4  # steps whose next tile sees all keys
    for i in range(unmasked):
        stage, phase, j, p, dk1, dk2, dv = _dkv_step(
            last - 4 * i, stage, phase, j, p, dk1, dk2, dv, k1_buf, k2_buf, v_buf, q1_buf, q2_buf, do_buf, lse_buf,
            delta_buf, q_full, do_full, q1_desc, q2_desc, do_desc, lse_desc, delta_desc, first, doc_start, first_key,
            g, scale, zero, D, DV, D2, S, COLUMNS, P1, P2, PV, False,
        )  # fmt: skip
    for i in range(unmasked, steps):
        stage, phase, j, p, dk1, dk2, dv = _dkv_step(
            last - 4 * i, stage, phase, j, p, dk1, dk2, dv, k1_buf, k2_buf, v_buf, q1_buf, q2_buf, do_buf, lse_buf,
            delta_buf, q_full, do_full, q1_desc, q2_desc, do_desc, lse_desc, delta_desc, first, doc_start, first_key,
            g, scale, zero, D, DV, D2, S, COLUMNS, P1, P2, PV, True,
        )  # fmt: skip
    W: gl.constexpr = D + DV
    partial += ((chunk.to(gl.int64) * C + start) * Hk + g) * W
    _store_partial(partial, dk1 * dk_scale, start, keys_end, Hk, W, D1, A1)
    if D2 > 0:
        _store_partial(partial + D1, dk2 * dk_scale, start, keys_end, Hk, W, D2, S)
    _store_partial(partial + D, dv, start, keys_end, Hk, W, DV, AV)


def backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, documents: Documents, spec: NSASpec,
    scale: float, dq: Tensor, accumulate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ops.compressed.backward` for what `takes` takes: writes or adds to dq, gives (dk, dv)."""
    Hq, D = q.shape[1:]
    Hk, Dv = v.shape[1:]
    table = documents.token_tiles(TOKEN_TILE)
    _compressed_dq_hopper[(table.shape[1] * PIECES, Hk)](
        *query_descriptors(q, 4), query_descriptors(do, 4)[0], *key_descriptors(k, DQ_KEYS),
        key_descriptors(v, DQ_KEYS)[0], lse, delta, dq, table, table.shape[1], scale * LOG2E, scale,
        Hq=Hq, D=D, DV=Dv, D2=max(D - 128, 0), KEYS=DQ_KEYS, K_STAGES=DQ_K_STAGES, V_STAGES=DQ_V_STAGES,
        ADD=accumulate, num_warps=4,
    )  # fmt: skip
    table, chunk = documents.key_tiles(DKV_KEYS), query_chunk(len(q))
    partial = torch.empty(triton.cdiv(len(q), chunk), len(k), Hk, D + Dv, dtype=torch.float32, device=q.device)
    _compressed_dkv_hopper[(table.shape[1], len(partial) * Hk)](
        *query_descriptors(q, 4), query_descriptors(do, 4)[0], row_descriptor(lse, 4), row_descriptor(delta, 4),
        *key_descriptors(k, DKV_KEYS), key_descriptors(v, DKV_KEYS)[0], partial, table, table.shape[1], len(k), chunk,
        scale * LOG2E, scale, Hk=Hk, D=D, DV=Dv, D2=max(D - 128, 0), num_warps=8,
    )  # fmt: skip
    return sum_partials(partial, k, v, table, chunk, spec, DKV_KEYS)
