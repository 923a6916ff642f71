"""dK and dV of selected attention for Hopper: a program takes one work item, a block and up to 2048 of its readers.

Four producer warps gather 4 readers times 16 heads, one reader each, 64 columns a message. Warpgroup 0 makes S, P and
dV, warpgroup 1 dP, dS and dK; P crosses through shared memory. Scores stand as [64 keys, 64 rows], so that P and dS are
register operands of the last products. One program an item, handed out in order: running programs stay near the same
tokens, so that the L2 cache serves their gathers; a persistent kernel drifts apart and costs a fifth more.
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
from nsa_train.ops.selected_plan import Unions, add_partial_sums, partial_sums, readers
from nsa_train.ops.selected_tiles_hopper import BLOCK
from nsa_train.ops.tiles import LOG2E
from nsa_train.ops.tiles_hopper import chunk_descriptor

STAGES = 4  # of 4 gathered readers


@gluon.jit
def _gather(
    J: gl.constexpr, q_desc, do_desc, k_desc, v_desc, lse_ptr, delta_ptr, q_buf, do_buf, lse_buf, delta_buf, k_buf,
    v_buf, full, empty, kv_full, tokens, lo, hi, start, g, T,
    Hq: gl.constexpr, NQ: gl.constexpr, NV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Producer warp J brings reader J of each 4: 16 rows of Q and dO, their lse and delta; warp 0 also the block.

    Behind the last reader it asks for token T: TMA gives zeros out of bounds, and lse is +inf.
    """
    head = gl.arange(0, 16, layout=gl.BlockedLayout([1], [32], [1], [0]))
    if J == 0:
        mbarrier.expect(kv_full, (NQ + NV) * 64 * 64 * 2)
        for x in gl.static_range(NQ):
            tma_load(k_desc, [start, g * NQ * 64 + 64 * x], kv_full, k_buf.index(x))
        for x in gl.static_range(NV):
            tma_load(v_desc, [start, g * NV * 64 + 64 * x], kv_full, v_buf.index(x))
    place = lo + J
    row = gl.load(tokens + place, mask=place < hi, other=T) * Hq + g * 16
    next_token = gl.load(tokens + place + 4, mask=place + 4 < hi, other=T)
    lse = gl.load(lse_ptr + row + head, mask=row + head < T * Hq, other=float("inf"))
    delta = gl.load(delta_ptr + row + head, mask=row + head < T * Hq, other=0.0)
    for i in range((hi - lo + 3) // 4):
        next_row = next_token * Hq + g * 16  # addresses and lse are fetched one and two steps ahead
        next_lse = gl.load(lse_ptr + next_row + head, mask=next_row + head < T * Hq, other=float("inf"))
        next_delta = gl.load(delta_ptr + next_row + head, mask=next_row + head < T * Hq, other=0.0)
        next_token = gl.load(tokens + place + 8, mask=place + 8 < hi, other=T)
        place += 4
        stage = i % STAGES
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, (NQ + NV) * 16 * 64 * 2)
        for x in gl.static_range(NQ):
            tma_load(q_desc, [row, 64 * x], bar, q_buf.index(stage * NQ + x).slice(16 * J, 16))
        for x in gl.static_range(NV):
            tma_load(do_desc, [row, 64 * x], bar, do_buf.index(stage * NV + x).slice(16 * J, 16))
        lse_buf.index(stage).slice(16 * J, 16).store(lse)
        delta_buf.index(stage).slice(16 * J, 16).store(delta)
        mbarrier.arrive(bar, count=1)
        lse = next_lse
        delta = next_delta
        row = next_row


@gluon.jit
def _scores(a_buf, b_buf, at, s, N: gl.constexpr):
    """s + A B^T over N chunks of 64 columns, in flight."""
    for x in gl.static_range(N):
        s = warpgroup_mma(a_buf.index(x), b_buf.index(at + x).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _add(a, b_buf, at, x0, x1, x2, N: gl.constexpr):
    """A B added to N chunks of 64 columns, in flight; the others stay as they are."""
    x0 = warpgroup_mma(a, b_buf.index(at), x0, is_async=True)
    if N > 1:
        x1 = warpgroup_mma(a, b_buf.index(at + 1), x1, is_async=True)
    if N > 2:
        x2 = warpgroup_mma(a, b_buf.index(at + 2), x2, is_async=True)
    return x0, x1, x2


@gluon.jit
def _arrived(x0, x1, x2, N: gl.constexpr):
    if N == 1:
        x0 = warpgroup_mma_wait(0, deps=(x0,))
    elif N == 2:
        x0, x1 = warpgroup_mma_wait(0, deps=(x0, x1))
    else:
        x0, x1, x2 = warpgroup_mma_wait(0, deps=(x0, x1, x2))
    return x0, x1, x2


@gluon.jit
def _store_chunks(ptr, row_offset, ok, x0, x1, x2, N: gl.constexpr, S: gl.constexpr):
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, S))
    at = ptr + row_offset[:, None] + column[None, :]
    gl.store(at, x0.to(ptr.dtype.element_ty), mask=ok[:, None])
    if N > 1:
        gl.store(at + 64, x1.to(ptr.dtype.element_ty), mask=ok[:, None])
    if N > 2:
        gl.store(at + 128, x2.to(ptr.dtype.element_ty), mask=ok[:, None])


@gluon.jit
def _store(
    ptr, part_ptr, x0, x1, x2, start, end, slot, g, Hk: gl.constexpr, N: gl.constexpr, S: gl.constexpr
):  # fmt: skip
    """The block's gradient [64, 64 N]; a partial sum of it where there is a slot."""
    key = gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    if slot < 0:
        row = (start + key).to(gl.int64) * Hk + g
        _store_chunks(ptr, row * (64 * N), start + key < end, x0, x1, x2, N, S)
    else:
        row = slot.to(gl.int64) * 64 + key
        _store_chunks(part_ptr, row * (64 * N), key < 64, x0, x1, x2, N, S)


@gluon.jit
def _values(
    dv_ptr, part_v_ptr, q_buf, do_buf, lse_buf, k_buf, p_buf, full, empty, kv_full, p_full, p_empty, lo, hi, inside,
    slot, start, end, g, scale,
    Hk: gl.constexpr, NQ: gl.constexpr, NV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """S = K Q^T, P = exp2(S - lse), dV += P dO. S of the next readers runs with dV of these."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    key = gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    reader = gl.arange(0, 64, layout=gl.SliceLayout(0, S)) // 16
    zero = gl.zeros([64, 64], gl.float32, layout=S)
    x0 = zero
    x1 = zero
    x2 = zero
    n = (hi - lo + 3) // 4
    mbarrier.wait(kv_full, 0)
    mbarrier.wait(full.index(0), 0)
    inverse = 1.0 / scale
    # the sum starts at -lse: exp2 needs no other operand, and 32 registers less
    s = _scores(k_buf, q_buf, 0, zero - (lse_buf.index(0).load(gl.SliceLayout(0, S)) * inverse)[None, :], NQ)
    s = warpgroup_mma_wait(0, deps=(s,))
    for i in range(n):
        stage = i % STAGES
        p = gl.exp2(s * scale)
        if inside + 4 * i < 64:  # the block's own tokens lead its list, all of them
            p = gl.where(key[:, None] <= (inside + 4 * i + reader)[None, :], p, 0.0)
        p_half = p.to(q_buf.dtype)
        mbarrier.wait(p_empty.index(i & 1), ((i >> 1) & 1) ^ 1)
        p_buf.index(i & 1).store(p_half)
        mbarrier.arrive(p_full.index(i & 1), count=1)
        following = (i + 1) % STAGES
        mbarrier.wait(full.index(following), ((i + 1) // STAGES) & 1, pred=i + 1 < n)  # after the last: unused
        lse = lse_buf.index(following).load(gl.SliceLayout(0, S))
        s = _scores(k_buf, q_buf, following * NQ, zero - (lse * inverse)[None, :], NQ)
        p_operand = gl.convert_layout(p_half, gl.DotOperandLayout(0, S, 2))
        x0, x1, x2 = _add(p_operand, do_buf, stage * NV, x0, x1, x2, NV)
        s = warpgroup_mma_wait(NV, deps=(s,))
        x0, x1, x2 = _arrived(x0, x1, x2, NV)
        mbarrier.arrive(empty.index(stage), count=1)
    _store(dv_ptr, part_v_ptr, x0, x1, x2, start, end, slot, g, Hk, NV, S)


@gluon.jit
def _keys(
    dk_ptr, part_k_ptr, q_buf, do_buf, delta_buf, v_buf, p_buf, full, empty, kv_full, p_full, p_empty, lo, hi, slot,
    start, end, g, dk_scale,
    Hk: gl.constexpr, NQ: gl.constexpr, NV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dP = V dO^T - delta, dS = P dP, dK += dS Q. dP of the next readers runs with dK of these."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    zero = gl.zeros([64, 64], gl.float32, layout=S)
    x0 = zero
    x1 = zero
    x2 = zero
    n = (hi - lo + 3) // 4
    mbarrier.wait(kv_full, 0)
    mbarrier.wait(full.index(0), 0)
    dp = _scores(v_buf, do_buf, 0, zero - delta_buf.index(0).load(gl.SliceLayout(0, S))[None, :], NV)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    for i in range(n):
        stage = i % STAGES
        mbarrier.wait(p_full.index(i & 1), (i >> 1) & 1)
        p = p_buf.index(i & 1).load(S)
        mbarrier.arrive(p_empty.index(i & 1), count=1)
        ds = gl.convert_layout((p.to(gl.float32) * dp).to(q_buf.dtype), gl.DotOperandLayout(0, S, 2))
        following = (i + 1) % STAGES
        mbarrier.wait(full.index(following), ((i + 1) // STAGES) & 1, pred=i + 1 < n)  # after the last: unused
        delta = delta_buf.index(following).load(gl.SliceLayout(0, S))
        dp = _scores(v_buf, do_buf, following * NV, zero - delta[None, :], NV)
        x0, x1, x2 = _add(ds, q_buf, stage * NQ, x0, x1, x2, NQ)
        dp = warpgroup_mma_wait(NQ, deps=(dp,))
        x0, x1, x2 = _arrived(x0, x1, x2, NQ)
        mbarrier.arrive(empty.index(stage), count=1)
    _store(
        dk_ptr, part_k_ptr, x0 * dk_scale, x1 * dk_scale, x2 * dk_scale, start, end, slot, g, Hk, NQ, S
    )  # fmt: skip


@gluon.jit
def _selected_dkv_hopper(
    q_desc, do_desc, k_desc, v_desc,
    lse_ptr,             # [T, Hq]  fp32, lowered by log2 of the gate
    delta_ptr,           # [T, Hq]  fp32
    dk_ptr, dv_ptr,      # [T, Hk, D], [T, Hk, Dv]
    part_k, part_v,      # [slots, 64, D], [slots, 64, Dv]  fp32
    tokens,              # [T * Hk * n]
    work,                # [5, W]
    table,               # [6, M]
    M, W, T, scale, dk_scale,
    Hk: gl.constexpr, NQ: gl.constexpr, NV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = q_desc.dtype
    Hq: gl.constexpr = 16 * Hk
    LINES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    item = work + gl.program_id(0)
    mine = gl.load(item)
    if mine < 0:
        return
    g = mine // M
    start = gl.load(table + mine % M)
    end = gl.load(table + M + mine % M)
    lo = gl.load(item + W)
    hi = gl.load(item + 2 * W)
    inside = gl.load(item + 3 * W)
    slot = gl.load(item + 4 * W)
    q_buf = gl.allocate_shared_memory(HALF, [STAGES * NQ, 64, 64], LINES)
    do_buf = gl.allocate_shared_memory(HALF, [STAGES * NV, 64, 64], LINES)
    k_buf = gl.allocate_shared_memory(HALF, [NQ, 64, 64], LINES)
    v_buf = gl.allocate_shared_memory(HALF, [NV, 64, 64], LINES)
    p_buf = gl.allocate_shared_memory(HALF, [2, 64, 64], LINES)
    lse_buf = gl.allocate_shared_memory(gl.float32, [STAGES, 64], ROWS)
    delta_buf = gl.allocate_shared_memory(gl.float32, [STAGES, 64], ROWS)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    p_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    p_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=8)  # each producer: its bytes, and its lse and delta
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(p_full.index(i), count=1)
        mbarrier.init(p_empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize([
        (_values, (dv_ptr, part_v, q_buf, do_buf, lse_buf, k_buf, p_buf, full, empty, kv_full, p_full, p_empty, lo, hi,
                   inside, slot, start, end, g, scale, Hk, NQ, NV, STAGES)),
        (_keys, (dk_ptr, part_k, q_buf, do_buf, delta_buf, v_buf, p_buf, full, empty, kv_full, p_full, p_empty, lo, hi,
                 slot, start, end, g, dk_scale, Hk, NQ, NV, STAGES)),
        (_gather, (0, q_desc, do_desc, k_desc, v_desc, lse_ptr, delta_ptr, q_buf, do_buf, lse_buf, delta_buf, k_buf,
                   v_buf, full, empty, kv_full, tokens, lo, hi, start, g, T, Hq, NQ, NV, STAGES)),
        (_gather, (1, q_desc, do_desc, k_desc, v_desc, lse_ptr, delta_ptr, q_buf, do_buf, lse_buf, delta_buf, k_buf,
                   v_buf, full, empty, kv_full, tokens, lo, hi, start, g, T, Hq, NQ, NV, STAGES)),
        (_gather, (2, q_desc, do_desc, k_desc, v_desc, lse_ptr, delta_ptr, q_buf, do_buf, lse_buf, delta_buf, k_buf,
                   v_buf, full, empty, kv_full, tokens, lo, hi, start, g, T, Hq, NQ, NV, STAGES)),
        (_gather, (3, q_desc, do_desc, k_desc, v_desc, lse_ptr, delta_ptr, q_buf, do_buf, lse_buf, delta_buf, k_buf,
                   v_buf, full, empty, kv_full, tokens, lo, hi, start, g, T, Hq, NQ, NV, STAGES)),
    ], [4, 1, 1, 1, 1], [216, 56, 56, 56, 56])  # fmt: skip


def keys_backward(
    q: Tensor, k: Tensor, v: Tensor, union: Unions, do: Tensor, lse: Tensor, delta: Tensor, documents: Documents,
    spec: NSASpec, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dk [T, Hk, D], dv [T, Hk, Dv]) along the readers of `union`; the rest as in `ops.selected.backward`."""
    T, _, D = q.shape
    Hk, Dv = v.shape[1:]
    read = readers(union, T, documents, spec)
    part_k, part_v = partial_sums(read, BLOCK, D, Dv)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    table = documents.token_tiles(TOKEN_TILE)
    W = read.work.shape[1]
    _selected_dkv_hopper[(W,)](
        chunk_descriptor(q.view(-1, D), 16), chunk_descriptor(do.view(-1, Dv), 16),
        chunk_descriptor(k.view(T, -1), BLOCK), chunk_descriptor(v.view(T, -1), BLOCK), lse, delta, dk, dv, part_k,
        part_v, read.tokens, read.work, table, table.shape[1], W, T, scale * LOG2E, scale,
        Hk=Hk, NQ=D // 64, NV=Dv // 64, STAGES=STAGES, num_warps=4, maxnreg=168,
    )  # fmt: skip
    add_partial_sums(read, part_k, part_v, dk, dv, documents, spec)
    return dk, dv
