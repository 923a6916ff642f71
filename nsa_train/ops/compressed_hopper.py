"""Compressed branch for Hopper in Gluon: TMA, mbarriers and asynchronous wgmma. Same functions as `ops.compressed`.

A program of the forward owns 8 tokens of one document times the 16 heads of a KV head: one TMA warp, two consumer
warpgroups of 64 rows. Each issues Q K of the next tile together with P V of this one and does its softmax under P V.
Newest keys first, so that only the first tile needs a mask. Notes and traps: docs/kernels/compressed.md.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_train.ops.compressed_hopper_bwd import backward
from nsa_train.ops.documents import TOKEN_TILE, Documents
from nsa_train.ops.gluon_names import tma_load, tma_store
from nsa_train.ops.reference import NSASpec
from nsa_train.ops.tiles import LOG2E
from nsa_train.ops.tiles_hopper import (
    PIECES,
    key_descriptors,
    keys_seen,
    load_wide,
    load_wide_queries,
    query_descriptors,
    scores,
    takes,
    token_piece,
)

__all__ = ["backward", "forward", "takes"]

KEYS = 128  # keys in a step: 681 TFLOP/s; 64 keys lose 15 %
STAGES = 2  # of K and V; more do not fit and would not help


@gluon.jit
def _produce(
    q1_desc, q2_desc, k1_desc, k2_desc, v_desc, q1_buf, q2_buf, k1_buf, k2_buf, v_buf,
    q_full, k_full, k_empty, v_full, v_empty, start, g, doc_cmp, n,
    D: gl.constexpr, DV: gl.constexpr, D2: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for w in gl.static_range(2):
        mbarrier.expect(q_full.index(w), 64 * D * 2)
        load_wide_queries(
            q1_desc, q2_desc, q1_buf.index(w), q2_buf.index(w), q_full.index(w), start + w * 4, g * 16, D2
        )
    for i in range(n):
        row = doc_cmp + (n - 1 - i) * KEYS
        stage = i % STAGES
        phase = (i // STAGES) & 1
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), KEYS * D * 2)
        load_wide(k1_desc, k2_desc, k1_buf.index(stage), k2_buf.index(stage), k_full.index(stage), row, g * D, D2)
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), KEYS * DV * 2)
        tma_load(v_desc, [row, g * DV], v_full.index(stage), v_buf.index(stage))


@gluon.jit
def _consume(
    W: gl.constexpr, o_desc, o_ptr, lse_ptr, q1_buf, q2_buf, k1_buf, k2_buf, v_buf,
    q_full, k_full, k_empty, v_full, v_empty, start, end, g, doc_start, n, scale,
    Hq: gl.constexpr, DV: gl.constexpr, D2: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Tokens 4 W ... 4 W + 3 of the piece: 64 rows, row = 16 token + head."""
    DTYPE: gl.constexpr = q1_buf.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])  # noqa: E741
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    q1 = q1_buf.index(W).reshape([64, DV])  # the first columns of Q are as many as those of V
    q2 = q2_buf.index(W).reshape([64, D2]) if D2 > 0 else q1
    zero = gl.zeros([64, KEYS], gl.float32, layout=S)
    o = gl.zeros([64, DV], gl.float32, layout=O)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    token = start + W * 4 + row // 16
    seen = keys_seen(token - doc_start)
    key = (n - 1) * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, S))
    mbarrier.wait(q_full.index(W), 0)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma_wait(0, deps=[scores(q1, q2, k1_buf.index(0), k2_buf.index(0), zero, D2)])
    mbarrier.arrive(k_empty.index(0), count=1)
    visible = key[None, :] < seen[:, None]
    s = gl.where(visible, s, -1.0e30)
    m = gl.max(s, 1) * scale
    p = gl.where(visible, gl.exp2(s * scale - m[:, None]), 0.0)
    total = gl.sum(p, 1)
    p_half = gl.convert_layout(p.to(DTYPE), P)
    for j in range(n - 1):
        k_stage = (j + 1) % STAGES
        mbarrier.wait(k_full.index(k_stage), ((j + 1) // STAGES) & 1)
        s_next = scores(q1, q2, k1_buf.index(k_stage), k2_buf.index(k_stage), zero, D2)
        v_stage = j % STAGES
        mbarrier.wait(v_full.index(v_stage), (j // STAGES) & 1)
        o_next = warpgroup_mma(p_half, v_buf.index(v_stage), o, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s_next])
        mbarrier.arrive(k_empty.index(k_stage), count=1)
        new = gl.maximum(m, gl.max(s, 1) * scale)
        p = gl.exp2(s * scale - new[:, None])
        alpha = gl.exp2(m - new)
        total = total * alpha + gl.sum(p, 1)
        m = new
        o = warpgroup_mma_wait(0, deps=[o_next])
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        o = o * gl.convert_layout(alpha, gl.SliceLayout(1, O))[:, None]
        p_half = gl.convert_layout(p.to(DTYPE), P)
    v_stage = (n - 1) % STAGES
    mbarrier.wait(v_full.index(v_stage), ((n - 1) // STAGES) & 1)
    o = warpgroup_mma_wait(0, deps=[warpgroup_mma(p_half, v_buf.index(v_stage), o, is_async=True)])
    nothing = total == 0.0
    lse = gl.where(nothing, float("inf"), m + gl.log2(total))
    gl.store(lse_ptr + token.to(gl.int64) * Hq + g * 16 + row % 16, lse, mask=token < end)
    o = o * gl.convert_layout(gl.where(nothing, 0.0, 1.0 / total), gl.SliceLayout(1, O))[:, None]
    if start + W * 4 + 4 <= end:
        q1.store(o.to(DTYPE))  # Q is no longer needed
        fence_async_shared()
        tma_store(o_desc, [start + W * 4, g * 16, 0], q1_buf.index(W))
        tma.store_wait(0)
    else:  # a whole tile would reach into the next document
        o_row = gl.arange(0, 64, layout=gl.SliceLayout(1, O))
        o_token = start + W * 4 + o_row // 16
        at = (o_token.to(gl.int64) * Hq + g * 16 + o_row % 16) * DV
        column = gl.arange(0, DV, layout=gl.SliceLayout(0, O))
        gl.store(o_ptr + at[:, None] + column[None, :], o.to(DTYPE), mask=(o_token < end)[:, None])


@gluon.jit
def _compressed_fwd_hopper(
    q1_desc, q2_desc, k1_desc, k2_desc, v_desc, o_desc,
    o_ptr,  # [T, Hq, Dv]
    lse_ptr,  # [T, Hq]  float32, base 2, +inf where nothing is seen
    table,  # [6, M]  int32
    M, scale,
    Hq: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, D2: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = q1_desc.dtype
    LINES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    TILES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    g = gl.program_id(1)
    piece = gl.num_programs(0) - 1 - gl.program_id(0)  # long rows first
    start, end, doc_start, doc_cmp = token_piece(table, M, piece)
    if start >= end:
        return
    n = gl.maximum((keys_seen(end - 1 - doc_start) + KEYS - 1) // KEYS, 1)
    q1_buf = gl.allocate_shared_memory(DTYPE, [2, 4, 16, D - D2], TILES)
    q2_buf = gl.allocate_shared_memory(DTYPE, [2, 4, 16, D2], TILES) if D2 > 0 else q1_buf
    k1_buf = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, D - D2], LINES)
    k2_buf = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, D2], LINES) if D2 > 0 else k1_buf
    v_buf = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, DV], LINES)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize([
        (_consume, (0, o_desc, o_ptr, lse_ptr, q1_buf, q2_buf, k1_buf, k2_buf, v_buf, q_full, k_full, k_empty, v_full,
                    v_empty, start, end, g, doc_start, n, scale, Hq, DV, D2, KEYS, STAGES)),
        (_consume, (1, o_desc, o_ptr, lse_ptr, q1_buf, q2_buf, k1_buf, k2_buf, v_buf, q_full, k_full, k_empty, v_full,
                    v_empty, start, end, g, doc_start, n, scale, Hq, DV, D2, KEYS, STAGES)),
        (_produce, (q1_desc, q2_desc, k1_desc, k2_desc, v_desc, q1_buf, q2_buf, k1_buf, k2_buf, v_buf, q_full, k_full,
                    k_empty, v_full, v_empty, start, g, doc_cmp, n, D, DV, D2, KEYS, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, spec: NSASpec, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ops.compressed.forward` for what `takes` takes: (o [T, Hq, Dv], lse fp32 [T, Hq])."""
    T, Hq, D = q.shape
    Hk, Dv = v.shape[1:]
    o = torch.empty(T, Hq, Dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(T, Hq, dtype=torch.float32, device=q.device)
    table = documents.token_tiles(TOKEN_TILE)
    _compressed_fwd_hopper[(table.shape[1] * PIECES, Hk)](
        *query_descriptors(q, 4), *key_descriptors(k, KEYS), key_descriptors(v, KEYS)[0], query_descriptors(o, 4)[0],
        o, lse, table, table.shape[1], scale * LOG2E,
        Hq=Hq, D=D, DV=Dv, D2=max(D - 128, 0), KEYS=KEYS, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
    return o, lse
