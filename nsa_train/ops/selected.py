"""Selected branch in plain Triton: each query attends to the visible tokens of the blocks chosen for its KV head.

Paper section 3.3.2, eq. 12. Reference: `reference.attend` with `reference.slc_visible`.
Runs for every width, group size and NSASpec.

    T  tokens, packed    Hq, Hk  query and KV heads    G = Hq // Hk    D, Dv  key and value width
    n, l'  slc_count, slc_block    HEADS  G padded to a power of two

Forward and dQ: a program owns a tile of TOKENS tokens with the G heads of one KV head, row r = token r // HEADS, head
r % HEADS, and walks the union of the tile's blocks, so that a block is loaded once for all tokens that chose it. dK and
dV: a program owns KEYS keys of a block and up to 2048 of the tokens that read it; where there are more, float32
partial sums are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_train.ops.documents import Documents
from nsa_train.ops.reference import NSASpec
from nsa_train.ops.rows import head_sizes, load_rows, query_rows, store_rows
from nsa_train.ops.selected_plan import (
    MASK_BITS,
    MOST_TOKENS,
    Unions,
    add_partial_sums,
    partial_sums,
    readers,
    unions,
)
from nsa_train.ops.tiles import LOG2E, WIDEST, power_of_two

# Rows of a program (tokens times heads) for 2-byte and for 4-byte numbers
FWD_ROWS = 64, 32  # 4 tokens of 16 heads; 8 tokens compute the union of 8 for all rows and lose 20 to 80 %
DQ_ROWS = 128, 32  # 8 tokens: 20 % faster than 4, which leave room for one program per SM only
DKV_ROWS = 32, 16  # 2 tokens a step; 4 spill or cross warpgroups, and take twice the time
KEYS = 64, 32
UNSEEN = tl.constexpr(1 << 30)  # position of a key that no row sees


@triton.jit
def _tile(table, M, TILES, TOKENS: tl.constexpr, PIECES: tl.constexpr):
    """(KV head, tile counted over the KV heads, start, end, doc_start) of this program; empty: start >= end."""
    mine = tl.program_id(0)
    column = mine % TILES // PIECES
    start = tl.load(table + column) + mine % TILES % PIECES * TOKENS
    end = tl.minimum(start + TOKENS, tl.load(table + M + column))
    return mine // TILES, mine.to(tl.int64), start, end, tl.load(table + 2 * M + column)


@triton.jit
def _keys(entries, i, doc_start, end, token, t, mine, L: tl.constexpr, KEYS: tl.constexpr):
    """Step i of a union: its keys, which of them to load, and which of them the rows see [ROWS, KEYS]."""
    CHUNKS: tl.constexpr = (L + KEYS - 1) // KEYS
    entry = tl.load(entries + i // CHUNKS)
    inside = i % CHUNKS * KEYS + tl.arange(0, KEYS)
    key = doc_start + (entry >> MASK_BITS) * L + inside
    there = (key < end) & (inside < L)
    newest = tl.where(mine & (((entry >> token) & 1) == 1), t, -1)
    return key, there, tl.where(there, key, UNSEEN)[None, :] <= newest[:, None]


# Forward --------------------------------------------------------------------------------------------------------------


@triton.jit
def _selected_fwd(
    q,        # [T, Hq, D]
    k,        # [T, Hk, D]
    v,        # [T, Hk, Dv]
    o,        # [T, Hq, Dv]
    lse,      # [T, Hq]  fp32, base 2, +inf where nothing is seen
    table,    # [6, M]
    entries,  # [Hk, TILES, TOKENS * n]
    counts,   # [Hk, TILES]
    M, TILES, scale,
    Hk: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, V1: tl.constexpr, N: tl.constexpr, L: tl.constexpr, TOKENS: tl.constexpr, PIECES: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    g, tile, start, end, doc_start = _tile(table, M, TILES, TOKENS, PIECES)
    if start >= end:
        return
    token, mine, at, q1, q2 = query_rows(q, start, end, g, Hk, G, HEADS, ROWS, D, D1, D2)
    t = start + token
    m = tl.full([ROWS], -1.0e30, tl.float32)  # finite: no row computes inf - inf
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, V1], tl.float32)
    for i in range(tl.load(counts + tile) * ((L + KEYS - 1) // KEYS)):
        key, there, seen = _keys(entries + tile * (TOKENS * N), i, doc_start, end, token, t, mine, L, KEYS)
        source = key.to(tl.int64) * Hk + g
        s = tl.dot(q1, load_rows(k, source * D, there, 0, D1, D).T, input_precision="ieee")
        if D2 > 0:
            s = tl.dot(q2, load_rows(k, source * D, there, D1, D2, D).T, s, input_precision="ieee")
        s = tl.where(seen, s * scale, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        alpha = tl.exp2(m - new)
        total = total * alpha + tl.sum(p, 1)
        m = new
        values = load_rows(v, source * DV, there, 0, V1, DV)
        acc = tl.dot(p.to(values.dtype), values, acc * alpha[:, None], input_precision="ieee")
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    tl.store(lse + at, tl.where(nothing, float("inf"), m + tl.log2(total)), mask=mine)
    store_rows(o, at * DV, acc / total[:, None], mine, 0, V1, DV, False)


# Backward -------------------------------------------------------------------------------------------------------------


@triton.jit
def _selected_dq(
    q,        # [T, Hq, D]
    k,        # [T, Hk, D]
    v,        # [T, Hk, Dv]
    do,       # [T, Hq, Dv]
    lse,      # [T, Hq]  fp32, lowered by log2 of the gate
    delta,    # [T, Hq]  fp32
    dq,       # [T, Hq, D]  written, or added to if ADD
    table,    # [6, M]
    entries,  # [Hk, TILES, TOKENS * n]
    counts,   # [Hk, TILES]
    M, TILES, scale, score_scale,
    Hk: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, V1: tl.constexpr, N: tl.constexpr, L: tl.constexpr, TOKENS: tl.constexpr, PIECES: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """dQ = scale * sum of dS K over the union, dS = P' (dO V^T - delta)."""
    g, tile, start, end, doc_start = _tile(table, M, TILES, TOKENS, PIECES)
    if start >= end:
        return
    token, mine, at, q1, q2 = query_rows(q, start, end, g, Hk, G, HEADS, ROWS, D, D1, D2)
    t = start + token
    grad = load_rows(do, at * DV, mine, 0, V1, DV)
    row_lse = tl.load(lse + at, mask=mine, other=float("inf"))
    row_delta = tl.load(delta + at, mask=mine, other=0.0)
    dq1 = tl.zeros([ROWS, D1], tl.float32)
    dq2 = tl.zeros([ROWS, D2], tl.float32) if D2 > 0 else dq1
    for i in range(tl.load(counts + tile) * ((L + KEYS - 1) // KEYS)):
        key, there, seen = _keys(entries + tile * (TOKENS * N), i, doc_start, end, token, t, mine, L, KEYS)
        source = key.to(tl.int64) * Hk + g
        k1 = load_rows(k, source * D, there, 0, D1, D)
        k2 = load_rows(k, source * D, there, D1, D2, D) if D2 > 0 else k1
        s = tl.dot(q1, k1.T, input_precision="ieee")
        if D2 > 0:
            s = tl.dot(q2, k2.T, s, input_precision="ieee")
        dp = tl.dot(grad, load_rows(v, source * DV, there, 0, V1, DV).T, input_precision="ieee")
        p = tl.where(seen, tl.exp2(s * score_scale - row_lse[:, None]), 0.0)
        ds = (p * (dp - row_delta[:, None])).to(k1.dtype)
        dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")
        if D2 > 0:
            dq2 = tl.dot(ds, k2, dq2, input_precision="ieee")
    store_rows(dq, at * D, dq1 * scale, mine, 0, D1, D, ADD)
    if D2 > 0:
        store_rows(dq, at * D, dq2 * scale, mine, D1, D2, D, ADD)


@triton.jit
def _selected_dkv(
    q,       # [T, Hq, D]
    k,       # [T, Hk, D]
    v,       # [T, Hk, Dv]
    do,      # [T, Hq, Dv]
    lse,     # [T, Hq]  fp32, lowered by log2 of the gate
    delta,   # [T, Hq]  fp32
    dk, dv,  # [T, Hk, D], [T, Hk, Dv]
    part_k, part_v,  # [slots, l', D], [slots, l', Dv]  fp32
    tokens,  # [T * Hk * n]
    work,    # [5, W]
    table,   # [6, M]
    M, W, scale, score_scale,
    Hk: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, V1: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dV = sum of P'^T dO and dK = scale * sum of dS^T Q over the tokens of a work item, scores as [keys, rows]."""
    item = tl.program_id(0)
    mine = tl.load(work + item)
    if mine < 0:
        return
    g, column = mine // M, mine % M
    inside = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    key = tl.load(table + column) + inside
    there = (key < tl.load(table + M + column)) & (inside < L)
    source = key.to(tl.int64) * Hk + g
    k1 = load_rows(k, source * D, there, 0, D1, D)
    k2 = load_rows(k, source * D, there, D1, D2, D) if D2 > 0 else k1
    values = load_rows(v, source * DV, there, 0, V1, DV)
    dk1 = tl.zeros([KEYS, D1], tl.float32)
    dk2 = tl.zeros([KEYS, D2], tl.float32) if D2 > 0 else dk1
    grad_v = tl.zeros([KEYS, V1], tl.float32)
    row = tl.arange(0, ROWS)
    head = row % HEADS
    hi = tl.load(work + 2 * W + item)
    for i in range(tl.load(work + W + item), hi, ROWS // HEADS):
        place = i + row // HEADS
        reads = (place < hi) & (head < G)
        t = tl.load(tokens + place, mask=reads, other=-1)
        at = t.to(tl.int64) * (Hk * G) + g * G + head
        q1 = load_rows(q, at * D, reads, 0, D1, D)
        q2 = load_rows(q, at * D, reads, D1, D2, D) if D2 > 0 else q1
        grad = load_rows(do, at * DV, reads, 0, V1, DV)
        s = tl.dot(k1, q1.T, input_precision="ieee")
        if D2 > 0:
            s = tl.dot(k2, q2.T, s, input_precision="ieee")
        p = tl.exp2(s * score_scale - tl.load(lse + at, mask=reads, other=float("inf"))[None, :])
        p = tl.where(key[:, None] <= t[None, :], p, 0.0)
        grad_v = tl.dot(p.to(grad.dtype), grad, grad_v, input_precision="ieee")
        dp = tl.dot(values, grad.T, input_precision="ieee")
        ds = (p * (dp - tl.load(delta + at, mask=reads, other=0.0)[None, :])).to(q1.dtype)
        dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
        if D2 > 0:
            dk2 = tl.dot(ds, q2, dk2, input_precision="ieee")
    slot = tl.load(work + 4 * W + item)
    if slot < 0:
        store_rows(dk, source * D, dk1 * scale, there, 0, D1, D, False)
        if D2 > 0:
            store_rows(dk, source * D, dk2 * scale, there, D1, D2, D, False)
        store_rows(dv, source * DV, grad_v, there, 0, V1, DV, False)
    else:
        line = slot.to(tl.int64) * L + inside
        store_rows(part_k, line * D, dk1 * scale, there, 0, D1, D, False)
        if D2 > 0:
            store_rows(part_k, line * D, dk2 * scale, there, D1, D2, D, False)
        store_rows(part_v, line * DV, grad_v, there, 0, V1, DV, False)


# Launch ---------------------------------------------------------------------------------------------------------------


def shapes(q: Tensor, v: Tensor, spec: NSASpec) -> dict[str, int]:
    """The sizes all kernels are compiled for."""
    return {**head_sizes(q, v), "L": spec.slc_block}


def settings(size: dict[str, int], rows: tuple[int, int], most_tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """Launch settings: fewer rows and keys for wide numbers and where D + Dv is over WIDEST, at least 16 of each."""
    wide = dtype.itemsize == 4
    narrower = power_of_two(triton.cdiv(size["D1"] + size["D2"] + size["V1"], WIDEST))
    filled = max(16, min(rows[wide] // narrower, most_tokens * size["HEADS"]), size["HEADS"])
    keys = min(max(16, KEYS[wide] // narrower), power_of_two(size["L"], 16))
    return {"ROWS": filled, "KEYS": keys, "num_warps": 8 if filled > 64 else 4, "num_stages": 2}


def walk(
    blocks: Tensor, documents: Documents, spec: NSASpec, size: dict[str, int], rows: int, by_block: bool
) -> tuple[Unions, dict[str, int]]:
    """Unions for programs of `rows` rows, and the sizes that belong to them."""
    union = unions(blocks, documents, spec, min(rows // size["HEADS"], MOST_TOKENS), by_block)
    TOKENS = union.entries.shape[2] // spec.slc_count
    return union, {"N": spec.slc_count, "TOKENS": TOKENS, "PIECES": triton.cdiv(spec.slc_block, TOKENS)}


def forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, documents: Documents, spec: NSASpec, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each query over the visible tokens of its blocks.

    q        [T, Hq, D]
    k, v     [T, Hk, D], [T, Hk, Dv]
    blocks   [T, Hk, n]  int32, numbers inside the document, ascending, own block among them, -1 last
    gives o  [T, Hq, Dv] dtype of q, and lse [T, Hq] fp32: log2 of the sum of 2^(scale log2(e) q . k)
    """
    T, Hq, _ = q.shape
    o = q.new_empty(T, Hq, v.shape[2])
    lse = torch.empty(T, Hq, dtype=torch.float32, device=q.device)
    size = shapes(q, v, spec)
    setting = settings(size, FWD_ROWS, MOST_TOKENS, q.dtype)
    union, tile = walk(blocks, documents, spec, size, setting["ROWS"], by_block=False)
    table = documents.token_tiles(spec.slc_block)
    _selected_fwd[(union.counts.numel(),)](
        q, k, v, o, lse, table, union.entries, union.counts, table.shape[1], union.counts.shape[1], scale * LOG2E,
        **size, **tile, **setting,
    )  # fmt: skip
    return o, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, do: Tensor, lse: Tensor, delta: Tensor, documents: Documents,
    spec: NSASpec, scale: float, dq: Tensor, accumulate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the gated selected branch; dq is written, or added to with `accumulate`.

    q, k, v, blocks  as in `forward`
    do          [T, Hq, Dv]   gradient of the whole op's output
    lse, delta  [T, Hq] fp32  lse - log2(gate), and <do, o_slc>
    dq          [T, Hq, D]
    gives dk    [T, Hk, D], dv [T, Hk, Dv]
    """
    T, _, D = q.shape
    size = shapes(q, v, spec)
    setting = settings(size, DQ_ROWS, MOST_TOKENS, q.dtype)
    union, tile = walk(blocks, documents, spec, size, setting["ROWS"], by_block=True)
    table = documents.token_tiles(spec.slc_block)
    M = table.shape[1]
    _selected_dq[(union.counts.numel(),)](
        q, k, v, do, lse, delta, dq, table, union.entries, union.counts, M, union.counts.shape[1], scale,
        scale * LOG2E, **size, **tile, **setting, ADD=accumulate,
    )  # fmt: skip
    read = readers(union, T, documents, spec)
    part_k, part_v = partial_sums(read, spec.slc_block, D, v.shape[2])
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    W = read.work.shape[1]
    setting = settings(size, DKV_ROWS, DKV_ROWS[0], q.dtype)
    _selected_dkv[(W, triton.cdiv(spec.slc_block, setting["KEYS"]))](
        q, k, v, do, lse, delta, dk, dv, part_k, part_v, read.tokens, read.work, table, M, W, scale, scale * LOG2E,
        **size, **setting,
    )  # fmt: skip
    add_partial_sums(read, part_k, part_v, dk, dv, documents, spec)
    return dk, dv
