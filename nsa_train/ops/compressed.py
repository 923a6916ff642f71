"""Compressed branch in plain Triton: each query attends to the compressed keys of its document that end before it.

Paper section 3.3.1 (attention over eq. 7's keys). Reference: `ops.reference.attend` with `cmp_visible`.
Notes: docs/kernels/compressed.md.

    T  tokens, packed    C  rows of compressed keys    Hq, Hk  query and KV heads    G = Hq // Hk
    D, Dv  key and value width    l  cmp_block    d  cmp_stride

Key c of a document is row doc_cmp + c; the query at position p of the document sees the first `keys_seen(p)` of them.
Forward and dQ: a program owns a few tokens of one document times the G heads of one KV head, all in one tile of rows,
so that keys and values are read once for all of them. dK, dV: a program owns a tile of keys times one chunk of the
document's queries and writes float32 partial sums, which a last kernel adds in the order of the chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_train.ops.documents import TOKEN_TILE, Documents
from nsa_train.ops.reference import NSASpec
from nsa_train.ops.rows import head_sizes, load_rows, store_rows, token_piece
from nsa_train.ops.tiles import LOG2E, WIDEST, power_of_two

SUM_ROWS = 8  # keys that a program of the last sum owns
CHUNKS = 32  # chunks of queries at most; partial sums take CHUNKS * C * Hk * (D + Dv) * 4 bytes (0.67 GB at T = 64k)
SMALLEST_CHUNK = 256  # queries; shorter chunks cost more in sums than they gain in programs


@triton.jit
def keys_seen(position, CMP_BLOCK: tl.constexpr, CMP_STRIDE: tl.constexpr):
    """How many compressed keys the token at `position` of its document sees: c d + l - 1 <= position."""
    return tl.maximum(position + 1 + CMP_STRIDE - CMP_BLOCK, 0) // CMP_STRIDE


@triton.jit
def _fwd_step(
    acc, m, total, q1, q2, k, v, c, seen, end, k_stride, v_stride, scale,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr,
    KEYS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over keys c ... c + KEYS, for the first V1 columns of the values."""
    key = c + tl.arange(0, KEYS)
    there = key < end
    s = tl.dot(q1, load_rows(k, key * k_stride, there, 0, D1, D).T, input_precision="ieee")
    if D2 > 0:
        s = tl.dot(q2, load_rows(k, key * k_stride, there, D1, D2, D).T, s, input_precision="ieee")
    if MASK:
        visible = key[None, :] < seen[:, None]
        s = tl.where(visible, s, -1.0e30)
    new = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new[:, None])
    if MASK:
        p = tl.where(visible, p, 0.0)
    alpha = tl.exp2(m - new)
    values = load_rows(v, key * v_stride, there, 0, V1, DV)
    acc = tl.dot(p.to(values.dtype), values, acc * alpha[:, None], input_precision="ieee")
    return acc, new, total * alpha + tl.sum(p, 1)


@triton.jit
def _compressed_fwd(
    q,  # [T, Hq, D]
    k,  # [C, Hk, D]
    v,  # [C, Hk, Dv]
    o,  # [T, Hq, Dv]
    lse,  # [T, Hq]  float32, base 2, +inf where nothing is seen
    table,  # [6, M]  int32
    M, scale,
    Hk: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    V1: tl.constexpr, CMP_BLOCK: tl.constexpr, CMP_STRIDE: tl.constexpr, TABLE_TILE: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(1)
    piece = tl.num_programs(0) - 1 - tl.program_id(0)  # long rows first
    start, end, doc_start, doc_cmp = token_piece(table, M, piece, TOKENS, TABLE_TILE)
    if start >= end:
        return
    row = tl.arange(0, TOKENS * HEADS)
    token, head = row // HEADS, row % HEADS
    ok = (start + token < end) & (head < G)
    first_head = start.to(tl.int64) * (Hk * G) + g * G
    head = token * (Hk * G) + head
    q += first_head * D
    q1 = load_rows(q, head * D, ok, 0, D1, D)
    q2 = load_rows(q, head * D, ok, D1, D2, D) if D2 > 0 else q1
    k += (doc_cmp.to(tl.int64) * Hk + g) * D
    v += (doc_cmp.to(tl.int64) * Hk + g) * DV
    seen = keys_seen(start + token - doc_start, CMP_BLOCK, CMP_STRIDE)
    m = tl.full([TOKENS * HEADS], -1.0e30, tl.float32)
    total = tl.zeros([TOKENS * HEADS], tl.float32)
    acc = tl.zeros([TOKENS * HEADS, V1], tl.float32)
    some = keys_seen(end - 1 - doc_start, CMP_BLOCK, CMP_STRIDE)  # seen by the last token
    every = keys_seen(start - doc_start, CMP_BLOCK, CMP_STRIDE) // KEYS * KEYS  # seen by all tokens
    for c in tl.range(0, every, KEYS):
        acc, m, total = _fwd_step(
            acc, m, total, q1, q2, k, v, c, seen, some, Hk * D, Hk * DV, scale, D, DV, D1, D2, V1, KEYS, False
        )
    for c in tl.range(every, some, KEYS):
        acc, m, total = _fwd_step(
            acc, m, total, q1, q2, k, v, c, seen, some, Hk * D, Hk * DV, scale, D, DV, D1, D2, V1, KEYS, True
        )
    nothing = total == 0.0
    tl.store(lse + first_head + head, tl.where(nothing, float("inf"), m + tl.log2(total)), mask=ok)
    acc *= tl.where(nothing, 0.0, 1.0 / total)[:, None]
    store_rows(o + first_head * DV, head * DV, acc, ok, 0, V1, DV, False)


@triton.jit
def _dq_step(
    dq1, dq2, q1, q2, do, lse, delta, k, v, c, seen, end, k_stride, v_stride, scale,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr,
    KEYS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    key = c + tl.arange(0, KEYS)
    there = key < end
    k1 = load_rows(k, key * k_stride, there, 0, D1, D)
    k2 = load_rows(k, key * k_stride, there, D1, D2, D) if D2 > 0 else k1
    s = tl.dot(q1, k1.T, input_precision="ieee")
    if D2 > 0:
        s = tl.dot(q2, k2.T, s, input_precision="ieee")
    dp = tl.dot(do, load_rows(v, key * v_stride, there, 0, V1, DV).T, input_precision="ieee")
    p = tl.exp2(s * scale - lse[:, None])
    if MASK:
        p = tl.where(key[None, :] < seen[:, None], p, 0.0)
    ds = (p * (dp - delta[:, None])).to(k1.dtype)
    dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")
    if D2 > 0:
        dq2 = tl.dot(ds, k2, dq2, input_precision="ieee")
    return dq1, dq2


@triton.jit
def _compressed_dq(
    q,  # [T, Hq, D]
    k,  # [C, Hk, D]
    v,  # [C, Hk, Dv]
    do,  # [T, Hq, Dv]
    lse,  # [T, Hq]  float32
    delta,  # [T, Hq]  float32
    dq,  # [T, Hq, D]  written, or added to
    table,  # [6, M]  int32
    M, scale, dq_scale,
    Hk: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    V1: tl.constexpr, CMP_BLOCK: tl.constexpr, CMP_STRIDE: tl.constexpr, TABLE_TILE: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(1)
    piece = tl.num_programs(0) - 1 - tl.program_id(0)
    start, end, doc_start, doc_cmp = token_piece(table, M, piece, TOKENS, TABLE_TILE)
    if start >= end:
        return
    row = tl.arange(0, TOKENS * HEADS)
    token, head = row // HEADS, row % HEADS
    ok = (start + token < end) & (head < G)
    first_head = start.to(tl.int64) * (Hk * G) + g * G
    head = token * (Hk * G) + head
    q += first_head * D
    q1 = load_rows(q, head * D, ok, 0, D1, D)
    q2 = load_rows(q, head * D, ok, D1, D2, D) if D2 > 0 else q1
    gradient = load_rows(do + first_head * DV, head * DV, ok, 0, V1, DV)
    row_lse = tl.load(lse + first_head + head, mask=ok, other=float("inf"))
    row_delta = tl.load(delta + first_head + head, mask=ok, other=0.0)
    k += (doc_cmp.to(tl.int64) * Hk + g) * D
    v += (doc_cmp.to(tl.int64) * Hk + g) * DV
    seen = keys_seen(start + token - doc_start, CMP_BLOCK, CMP_STRIDE)
    dq1 = tl.zeros([TOKENS * HEADS, D1], tl.float32)
    dq2 = tl.zeros([TOKENS * HEADS, D2], tl.float32) if D2 > 0 else 0.0
    some = keys_seen(end - 1 - doc_start, CMP_BLOCK, CMP_STRIDE)
    every = keys_seen(start - doc_start, CMP_BLOCK, CMP_STRIDE) // KEYS * KEYS
    for c in tl.range(0, every, KEYS):
        dq1, dq2 = _dq_step(
            dq1, dq2, q1, q2, gradient, row_lse, row_delta, k, v, c, seen, some, Hk * D, Hk * DV, scale,
            D, DV, D1, D2, V1, KEYS, False,
        )  # fmt: skip
    for c in tl.range(every, some, KEYS):
        dq1, dq2 = _dq_step(
            dq1, dq2, q1, q2, gradient, row_lse, row_delta, k, v, c, seen, some, Hk * D, Hk * DV, scale,
            D, DV, D1, D2, V1, KEYS, True,
        )  # fmt: skip
    dq += first_head * D
    store_rows(dq, head * D, dq1 * dq_scale, ok, 0, D1, D, ADD)
    if D2 > 0:
        store_rows(dq, head * D, dq2 * dq_scale, ok, D1, D2, D, ADD)


@triton.jit
def queries_of_keys(
    tile, M, chunk, CHUNK, CMP_BLOCK: tl.constexpr, CMP_STRIDE: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """Positions [first, end) of chunk `chunk` that see keys of a tile, and from which on they see all its keys."""
    start, keys_end = tl.load(tile), tl.load(tile + M)
    doc_cmp = tl.load(tile + 4 * M)
    length = tl.load(tile + 3 * M) - tl.load(tile + 2 * M)
    first = tl.maximum((start - doc_cmp) * CMP_STRIDE + CMP_BLOCK - 1, chunk * CHUNK) // TOKENS * TOKENS
    end = tl.where(start < keys_end, tl.minimum(length, (chunk + 1) * CHUNK), 0)
    all_from = (keys_end - 1 - doc_cmp) * CMP_STRIDE + CMP_BLOCK - 1
    all_from = (all_from + TOKENS - 1) // TOKENS * TOKENS
    return first, end, tl.minimum(tl.maximum(all_from, first), end)


@triton.jit
def _dkv_step(
    dk1, dk2, dv, k1, k2, v, q, do, lse, delta, first_key, position, end,
    scale, Hk: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    V1: tl.constexpr, CMP_BLOCK: tl.constexpr, CMP_STRIDE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    KEYS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One tile of queries; scores are transposed, [keys, rows], so that P and dS need no transposition."""
    row = tl.arange(0, TOKENS * HEADS)
    token, head = position + row // HEADS, row % HEADS
    ok = (token < end) & (head < G)
    first = (tl.full([], 0, tl.int64) + position) * (Hk * G)  # of a long document: offsets from here on are small
    head = row // HEADS * (Hk * G) + head
    q, do, lse, delta = q + first * D, do + first * DV, lse + first, delta + first
    q1 = load_rows(q, head * D, ok, 0, D1, D)
    q2 = load_rows(q, head * D, ok, D1, D2, D) if D2 > 0 else q1
    s = tl.dot(k1, q1.T, input_precision="ieee")
    if D2 > 0:
        s = tl.dot(k2, q2.T, s, input_precision="ieee")
    p = tl.exp2(s * scale - tl.load(lse + head, mask=ok, other=float("inf"))[None, :])
    if MASK:
        seen = keys_seen(token, CMP_BLOCK, CMP_STRIDE)
        p = tl.where((first_key + tl.arange(0, KEYS))[:, None] < seen[None, :], p, 0.0)
    gradient = load_rows(do, head * DV, ok, 0, V1, DV)
    dv = tl.dot(p.to(gradient.dtype), gradient, dv, input_precision="ieee")
    dp = tl.dot(v, gradient.T, input_precision="ieee")
    ds = (p * (dp - tl.load(delta + head, mask=ok, other=0.0)[None, :])).to(q1.dtype)
    dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
    if D2 > 0:
        dk2 = tl.dot(ds, q2, dk2, input_precision="ieee")
    return dk1, dk2, dv


@triton.jit
def _compressed_dkv(
    q,  # [T, Hq, D]
    k,  # [C, Hk, D]
    v,  # [C, Hk, Dv]
    do,  # [T, Hq, Dv]
    lse,  # [T, Hq]  float32
    delta,  # [T, Hq]  float32
    partial,  # [chunks, C, Hk, D + Dv]  float32
    table,  # [6, M]  int32, tiles of keys
    M, C, CHUNK, scale, dk_scale,
    Hk: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    V1: tl.constexpr, CMP_BLOCK: tl.constexpr, CMP_STRIDE: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    tile = table + tl.program_id(0)  # key tiles run fastest: programs that read the same queries run together
    chunk, g = tl.program_id(1) // Hk, tl.program_id(1) % Hk
    first, end, all_from = queries_of_keys(tile, M, chunk, CHUNK, CMP_BLOCK, CMP_STRIDE, TOKENS)
    if first >= end:
        return
    start, keys_end, doc_start = tl.load(tile), tl.load(tile + M), tl.load(tile + 2 * M)
    row = tl.arange(0, KEYS)
    there = start + row < keys_end
    first_key = start.to(tl.int64) * Hk + g
    k1 = load_rows(k + first_key * D, row * (Hk * D), there, 0, D1, D)
    k2 = load_rows(k + first_key * D, row * (Hk * D), there, D1, D2, D) if D2 > 0 else k1
    values = load_rows(v + first_key * DV, row * (Hk * DV), there, 0, V1, DV)
    first_head = doc_start.to(tl.int64) * (Hk * G) + g * G
    q += first_head * D
    do += first_head * DV
    lse += first_head
    delta += first_head
    dk1 = tl.zeros([KEYS, D1], tl.float32)
    dk2 = tl.zeros([KEYS, D2], tl.float32) if D2 > 0 else 0.0
    dv = tl.zeros([KEYS, V1], tl.float32)
    first_in_doc = start - tl.load(tile + 4 * M)
    for position in tl.range(first, all_from, TOKENS):
        dk1, dk2, dv = _dkv_step(
            dk1, dk2, dv, k1, k2, values, q, do, lse, delta, first_in_doc, position, end,
            scale, Hk, G, D, DV, D1, D2, V1, CMP_BLOCK, CMP_STRIDE, TOKENS, HEADS, KEYS, True,
        )  # fmt: skip
    for position in tl.range(all_from, end, TOKENS):
        dk1, dk2, dv = _dkv_step(
            dk1, dk2, dv, k1, k2, values, q, do, lse, delta, first_in_doc, position, end,
            scale, Hk, G, D, DV, D1, D2, V1, CMP_BLOCK, CMP_STRIDE, TOKENS, HEADS, KEYS, False,
        )  # fmt: skip
    partial += ((chunk.to(tl.int64) * C + start) * Hk + g) * (D + DV)
    row *= Hk * (D + DV)
    store_rows(partial, row, dk1 * dk_scale, there, 0, D1, D, False)
    if D2 > 0:
        store_rows(partial, row, dk2 * dk_scale, there, D1, D2, D, False)
    store_rows(partial + D, row, dv, there, 0, V1, DV, False)


@triton.jit
def _compressed_dkv_sum(
    partial,  # [chunks, C, Hk, D + Dv]  float32
    dk,  # [C, Hk, D]
    dv,  # [C, Hk, Dv]
    table,  # [6, M]  int32, the tiles of keys of _compressed_dkv
    M, C, CHUNK,
    Hk: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CMP_BLOCK: tl.constexpr, CMP_STRIDE: tl.constexpr,
    KEYS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums of ROWS keys of a tile over the chunks that wrote them, in order."""
    PER: tl.constexpr = KEYS // ROWS
    tile = table + tl.program_id(0) // PER
    start = tl.load(tile)
    row = start + tl.program_id(0) % PER * ROWS + tl.arange(0, ROWS)
    there = row < tl.load(tile + M)
    length = tl.load(tile + 3 * M) - tl.load(tile + 2 * M)
    column = tl.arange(0, WIDTH)
    mask = there[:, None] & (column < D + DV)[None, :]
    row = row.to(tl.int64)
    g = tl.program_id(1)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    first = ((start - tl.load(tile + 4 * M)) * CMP_STRIDE + CMP_BLOCK - 1) // CHUNK
    for chunk in tl.range(first, (length + CHUNK - 1) // CHUNK):
        at = ((row + chunk * C) * Hk + g) * (D + DV)
        total += tl.load(partial + at[:, None] + column[None, :], mask=mask, other=0.0)
    key = row * Hk + g
    of_k = column < D
    tl.store(dk + (key * D)[:, None] + column[None, :], total.to(dk.dtype.element_ty), mask=mask & of_k[None, :])
    at_v = (key * DV)[:, None] + (column - D)[None, :]
    tl.store(dv + at_v, total.to(dv.dtype.element_ty), mask=mask & (column >= D)[None, :])


class Tiles(NamedTuple):
    """rows (tokens times padded heads) and keys of a tile in forward and dQ, and in dK, dV."""

    rows: int
    keys: int
    dkv_rows: int
    dkv_keys: int
    warps: int
    stages: int


HALF = Tiles(128, 64, 32, 128, 8, 2)
FLOAT = Tiles(64, 32, 32, 64, 4, 1)  # float32, or heads too wide for the shared memory of HALF


def tiles_for(q: Tensor, v: Tensor) -> Tiles:
    return HALF if q.dtype.itemsize == 2 and q.shape[2] + v.shape[2] <= WIDEST else FLOAT


def query_chunk(T: int) -> int:
    """Queries in a chunk of dK, dV: a power of two, CHUNKS chunks at most."""
    return max(SMALLEST_CHUNK, power_of_two(triton.cdiv(T, CHUNKS)))


def geometry(q: Tensor, v: Tensor, spec: NSASpec, rows: int) -> dict[str, int]:
    """Sizes that kernels are compiled for; TOKENS times HEADS rows of queries make a tile."""
    sizes = head_sizes(q, v)
    heads = sizes["HEADS"]
    tokens = min(max(rows // heads, 16 // heads, 1), TOKEN_TILE)
    return {**sizes, "CMP_BLOCK": spec.cmp_block, "CMP_STRIDE": spec.cmp_stride, "TOKENS": tokens}


def forward(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, spec: NSASpec, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o_t = sum_c softmax_c(scale q_t . k_c) v_c over the keys c with c d + l - 1 <= t (paper eq. 1 on eq. 7's keys).

    q    [T, Hq, D]
    k, v [C, Hk, D], [C, Hk, Dv]   document after document; rows behind the last key are not read
    gives o [T, Hq, Dv], zeros where a query sees nothing, and lse fp32 [T, Hq], base 2, +inf there
    """
    T, Hq, _ = q.shape
    Hk, Dv = v.shape[1:]
    o = torch.empty(T, Hq, Dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(T, Hq, dtype=torch.float32, device=q.device)
    table = documents.token_tiles(TOKEN_TILE)
    tiles = tiles_for(q, v)
    sizes = geometry(q, v, spec, tiles.rows)
    _compressed_fwd[(table.shape[1] * (TOKEN_TILE // sizes["TOKENS"]), Hk)](
        q, k, v, o, lse, table, table.shape[1], scale * LOG2E,
        **sizes, TABLE_TILE=TOKEN_TILE, KEYS=tiles.keys, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return o, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, documents: Documents, spec: NSASpec,
    scale: float, dq: Tensor, accumulate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """P = exp2(scale log2(e) q . k - lse), dV = P^T dO, dS = P (dO V^T - delta), dQ = scale dS K, dK = scale dS^T Q.

    q    [T, Hq, D]
    k, v [C, Hk, D], [C, Hk, Dv]
    do   [T, Hq, Dv]       gradient of the whole op's output
    lse, delta  fp32 [T, Hq]   lse lowered by log2(gate); <do, o> of this branch
    dq   [T, Hq, D]        written, or added to if `accumulate`
    gives dk, dv in the shapes of k and v, zeros in rows behind the last key
    """
    Hk = v.shape[1]
    table = documents.token_tiles(TOKEN_TILE)
    tiles = tiles_for(q, v)
    sizes = geometry(q, v, spec, tiles.rows)
    _compressed_dq[(table.shape[1] * (TOKEN_TILE // sizes["TOKENS"]), Hk)](
        q, k, v, do, lse, delta, dq, table, table.shape[1], scale * LOG2E, scale,
        **sizes, TABLE_TILE=TOKEN_TILE, KEYS=tiles.keys, ADD=accumulate,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    sizes = geometry(q, v, spec, tiles.dkv_rows)
    table = documents.key_tiles(tiles.dkv_keys)
    chunk = max(query_chunk(len(q)), sizes["TOKENS"])
    partial = torch.empty(
        triton.cdiv(len(q), chunk), *k.shape[:2], q.shape[2] + v.shape[2], dtype=torch.float32, device=q.device
    )  # fmt: skip
    _compressed_dkv[(table.shape[1], len(partial) * Hk)](
        q, k, v, do, lse, delta, partial, table, table.shape[1], len(k), chunk, scale * LOG2E, scale,
        **sizes, KEYS=tiles.dkv_keys, num_warps=tiles.warps, num_stages=1,
    )  # fmt: skip
    return sum_partials(partial, k, v, table, chunk, spec, tiles.dkv_keys)


def sum_partials(
    partial: Tensor, k: Tensor, v: Tensor, table: Tensor, chunk: int, spec: NSASpec, keys: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dK, dV from the partial sums [chunks, C, Hk, D + Dv] of key tiles `table` of `keys` keys."""
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    (Hk, D), Dv = k.shape[1:], v.shape[2]
    _compressed_dkv_sum[(table.shape[1] * (keys // SUM_ROWS), Hk)](
        partial, dk, dv, table, table.shape[1], len(k), chunk, Hk=Hk, D=D, DV=Dv,
        CMP_BLOCK=spec.cmp_block, CMP_STRIDE=spec.cmp_stride,
        KEYS=keys, ROWS=SUM_ROWS, WIDTH=power_of_two(D + Dv), num_warps=4,
    )  # fmt: skip
    return dk, dv
