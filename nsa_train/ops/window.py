"""Sliding window (paper section 3.3, branch `win`): query t sees the tokens t - w + 1 ... t of its document.

Reference: `reference.attend` with `reference.win_visible`. Plain Triton for every width, group size and window;
`window_hopper` has the same functions for the shapes that Hopper is tuned for.

    T  tokens, packed    Hq, Hk  query and KV heads    G = Hq // Hk    D, Dv  key and value width    w  window

Forward and dQ: a program owns TOK consecutive tokens of one document with the G heads of one KV head (`rows`). Its keys
are whole tiles that end where its tokens end, so that only the newest needs the causal mask and most need none, and
narrow tiles for the w % BN + TOK - 1 older ones. A program near the start of its document masks everything. dK and dV:
a program owns KEYS keys of one document and one KV head, and walks the tokens that see them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_train.ops.documents import TOKEN_TILE, Documents
from nsa_train.ops.reference import NSASpec
from nsa_train.ops.rows import head_sizes, load_rows, query_rows, store_rows, token_piece
from nsa_train.ops.tiles import LOG2E, power_of_two

HIDDEN = tl.constexpr(-1.0e30)  # score of a key that is not visible; finite, so that no row computes inf - inf


# Forward --------------------------------------------------------------------------------------------------------------


@triton.jit
def _fwd_step(
    acc, m, total, q1, q2, k, v, t, oldest, doc_start, at, hk, scale,
    Hk: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr,
    BN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys at ... at + BN - 1; MASK where some row does not see all of them."""
    key = at + tl.arange(0, BN)
    there = (key >= doc_start) if MASK else (key >= 0)
    row = key.to(tl.int64) * Hk + hk
    k1 = load_rows(k, row * D, there, 0, D1, D)
    s = tl.dot(q1, tl.trans(k1), input_precision="ieee")  # [rows, BN]
    if D2:
        k2 = load_rows(k, row * D, there, D1, D2, D)
        s = tl.dot(q2, tl.trans(k2), s, input_precision="ieee")
    s *= scale
    if MASK:
        seen = (key[None, :] >= oldest[:, None]) & (key[None, :] <= t[:, None])
        s = tl.where(seen, s, HIDDEN)
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - m_new[:, None])
    if MASK:
        p = tl.where(seen, p, 0.0)
    shrink = tl.exp2(m - m_new)
    values = load_rows(v, row * DV, there, 0, V1, DV)
    acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return acc, m_new, total * shrink + tl.sum(p, 1)


@triton.jit
def _key_ranges(t1, doc_start, W: tl.constexpr, TOK: tl.constexpr, BN: tl.constexpr, TAIL: tl.constexpr):
    """Where the key tiles of tokens t0 ... t1 - 1 begin: (old, start, middle), all before t1, where they end.

    From `old` to `start` tiles of TAIL keys, from there tiles of BN; those from `start` to `middle` need no mask.
    """
    WHOLE: tl.constexpr = W // BN * BN
    OLD: tl.constexpr = (W - WHOLE + TOK - 1 + TAIL - 1) // TAIL * TAIL
    NEWEST: tl.constexpr = (TOK + BN - 1) // BN * BN
    DIAGONAL: tl.constexpr = NEWEST if NEWEST < WHOLE else WHOLE
    inside = t1 - WHOLE - OLD >= doc_start  # no key of these tiles lies before the document
    start = tl.where(inside, t1 - WHOLE, t1 - tl.cdiv(t1 - doc_start, BN) * BN)
    old = tl.where(inside, start - OLD, start)
    middle = tl.where(inside, t1 - DIAGONAL, start)
    return old, start, middle


@triton.jit
def _win_fwd(
    q,      # [T, Hq, D]
    k,      # [T, Hk, D]
    v,      # [T, Hk, Dv]
    o,      # [T, Hq, Dv]
    lse,    # [T, Hq]      fp32, base 2
    table,  # [6, M]       tiles of TILE tokens
    M, scale,
    Hk: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, V1: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr, TOK: tl.constexpr, BN: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    hk = tl.program_id(1)
    t0, t1, doc_start, _ = token_piece(table, M, tl.program_id(0), TOK, TILE)
    if t0 >= t1:
        return
    token, mine, row, q1, q2 = query_rows(q, t0, t1, hk, Hk, G, HEADS, TOK * HEADS, D, D1, D2)
    t = t0 + token
    oldest = tl.maximum(t - W + 1, doc_start)
    acc = tl.zeros([TOK * HEADS, V1], tl.float32)
    m = tl.full([TOK * HEADS], HIDDEN, tl.float32)
    total = tl.zeros([TOK * HEADS], tl.float32)
    old, start, middle = _key_ranges(t1, doc_start, W, TOK, BN, TAIL)
    for at in tl.range(old, start, TAIL):
        acc, m, total = _fwd_step(
            acc, m, total, q1, q2, k, v, t, oldest, doc_start, at, hk, scale, Hk, D, DV, D1, D2, V1, TAIL, True,
        )  # fmt: skip
    for at in tl.range(start, middle, BN):
        acc, m, total = _fwd_step(
            acc, m, total, q1, q2, k, v, t, oldest, doc_start, at, hk, scale, Hk, D, DV, D1, D2, V1, BN, False,
        )  # fmt: skip
    for at in tl.range(middle, t1, BN):
        acc, m, total = _fwd_step(
            acc, m, total, q1, q2, k, v, t, oldest, doc_start, at, hk, scale, Hk, D, DV, D1, D2, V1, BN, True,
        )  # fmt: skip
    total = tl.where(mine, total, 1.0)
    tl.store(lse + row, m + tl.log2(total), mask=mine)
    store_rows(o, row * DV, acc / total[:, None], mine, 0, V1, DV, False)


# Backward: dQ ---------------------------------------------------------------------------------------------------------


@triton.jit
def _dq_step(
    dq1, dq2, q1, q2, do, lse, delta, k, v, t, oldest, doc_start, at, hk, scale,
    Hk: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr,
    BN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """dQ += dS K over the keys at ... at + BN - 1, with dS = P' (dO V^T - delta)."""
    key = at + tl.arange(0, BN)
    there = (key >= doc_start) if MASK else (key >= 0)
    row = key.to(tl.int64) * Hk + hk
    k1 = load_rows(k, row * D, there, 0, D1, D)
    s = tl.dot(q1, tl.trans(k1), input_precision="ieee")  # [rows, BN]
    if D2:
        k2 = load_rows(k, row * D, there, D1, D2, D)
        s = tl.dot(q2, tl.trans(k2), s, input_precision="ieee")
    dp = tl.dot(do, tl.trans(load_rows(v, row * DV, there, 0, V1, DV)), input_precision="ieee")
    p = tl.exp2(s * scale - lse[:, None])
    if MASK:
        p = tl.where((key[None, :] >= oldest[:, None]) & (key[None, :] <= t[:, None]), p, 0.0)
    ds = (p * (dp - delta[:, None])).to(k1.dtype)
    dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")
    if D2:
        dq2 = tl.dot(ds, k2, dq2, input_precision="ieee")
    return dq1, dq2


@triton.jit
def _win_dq(
    q,      # [T, Hq, D]
    k,      # [T, Hk, D]
    v,      # [T, Hk, Dv]
    do,     # [T, Hq, Dv]
    lse,    # [T, Hq]      fp32, lowered by log2 of the gate
    delta,  # [T, Hq]      fp32
    dq,     # [T, Hq, D]   written, or added to if ADD
    table,  # [6, M]       tiles of TILE tokens
    M, scale, score_scale,
    Hk: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, V1: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr, TOK: tl.constexpr, BN: tl.constexpr,
    TAIL: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    hk = tl.program_id(1)
    t0, t1, doc_start, _ = token_piece(table, M, tl.program_id(0), TOK, TILE)
    if t0 >= t1:
        return
    token, mine, row, q1, q2 = query_rows(q, t0, t1, hk, Hk, G, HEADS, TOK * HEADS, D, D1, D2)
    t = t0 + token
    dq2 = tl.zeros([TOK * HEADS, D2], tl.float32) if D2 else 0.0
    dq1 = tl.zeros([TOK * HEADS, D1], tl.float32)
    grad = load_rows(do, row * DV, mine, 0, V1, DV)
    row_lse = tl.load(lse + row, mask=mine, other=float("inf"))
    row_delta = tl.load(delta + row, mask=mine, other=0.0)
    oldest = tl.maximum(t - W + 1, doc_start)
    old, start, middle = _key_ranges(t1, doc_start, W, TOK, BN, TAIL)
    for at in tl.range(old, start, TAIL):
        dq1, dq2 = _dq_step(
            dq1, dq2, q1, q2, grad, row_lse, row_delta, k, v, t, oldest, doc_start, at, hk, score_scale, Hk, D, DV,
            D1, D2, V1, TAIL, True,
        )  # fmt: skip
    for at in tl.range(start, middle, BN):
        dq1, dq2 = _dq_step(
            dq1, dq2, q1, q2, grad, row_lse, row_delta, k, v, t, oldest, doc_start, at, hk, score_scale, Hk, D, DV,
            D1, D2, V1, BN, False,
        )  # fmt: skip
    for at in tl.range(middle, t1, BN):
        dq1, dq2 = _dq_step(
            dq1, dq2, q1, q2, grad, row_lse, row_delta, k, v, t, oldest, doc_start, at, hk, score_scale, Hk, D, DV,
            D1, D2, V1, BN, True,
        )  # fmt: skip
    store_rows(dq, row * D, dq1 * scale, mine, 0, D1, D, ADD)
    if D2:
        store_rows(dq, row * D, dq2 * scale, mine, D1, D2, D, ADD)


# Backward: dK and dV --------------------------------------------------------------------------------------------------


@triton.jit
def _dkv_step(
    dk1, dk2, dv, k1, k2, values, q, do, lse, delta, key, at, t_end, hk, score_scale,
    Hk: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, V1: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """dV += P'^T dO and dK += dS^T Q over the tokens at ... at + STEP - 1; scores are transposed, [keys, rows]."""
    r = tl.arange(0, STEP * HEADS)
    t = at + r // HEADS
    there = r % HEADS < G
    if MASK:
        there = there & (t < t_end)
    row = t.to(tl.int64) * (Hk * G) + hk * G + r % HEADS
    q1 = load_rows(q, row * D, there, 0, D1, D)
    s = tl.dot(k1, tl.trans(q1), input_precision="ieee")
    if D2:
        q2 = load_rows(q, row * D, there, D1, D2, D)
        s = tl.dot(k2, tl.trans(q2), s, input_precision="ieee")
    p = tl.exp2(s * score_scale - tl.load(lse + row, mask=there, other=float("inf"))[None, :])
    if MASK:
        p = tl.where((key[:, None] <= t[None, :]) & (key[:, None] > t[None, :] - W), p, 0.0)
    grad = load_rows(do, row * DV, there, 0, V1, DV)
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
    dp = tl.dot(values, tl.trans(grad), input_precision="ieee")
    ds = (p * (dp - tl.load(delta + row, mask=there, other=0.0)[None, :])).to(q1.dtype)
    dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
    if D2:
        dk2 = tl.dot(ds, q2, dk2, input_precision="ieee")
    return dk1, dk2, dv


@triton.jit
def _win_dkv(
    q,      # [T, Hq, D]
    k,      # [T, Hk, D]
    v,      # [T, Hk, Dv]
    do,     # [T, Hq, Dv]
    lse,    # [T, Hq]      fp32, lowered by log2 of the gate
    delta,  # [T, Hq]      fp32
    dk,     # [T, Hk, D]
    dv,     # [T, Hk, Dv]
    table,  # [6, M]       tiles of KEYS tokens
    M, scale, score_scale,
    Hk: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, V1: tl.constexpr, W: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    column, hk = tl.program_id(0), tl.program_id(1)
    first = tl.load(table + column)
    last = tl.load(table + M + column) - 1
    if last < first:
        return
    key = first + tl.arange(0, KEYS)
    mine = key <= last
    row = key.to(tl.int64) * Hk + hk
    k1 = load_rows(k, row * D, mine, 0, D1, D)
    k2, dk2 = k1, 0.0
    if D2:
        k2 = load_rows(k, row * D, mine, D1, D2, D)
        dk2 = tl.zeros([KEYS, D2], tl.float32)
    values = load_rows(v, row * DV, mine, 0, V1, DV)
    dk1 = tl.zeros([KEYS, D1], tl.float32)
    grad_v = tl.zeros([KEYS, V1], tl.float32)
    t_end = tl.minimum(last + W, tl.load(table + 3 * M + column))
    # from `first` on some keys are in a token's future, from `middle` it sees all, from `late` on some are too old
    middle = tl.minimum(first + (KEYS + STEP - 2) // STEP * STEP, t_end)
    late = middle + tl.maximum(tl.minimum(first + W, t_end) - middle, 0) // STEP * STEP
    for at in tl.range(first, middle, STEP):
        dk1, dk2, grad_v = _dkv_step(
            dk1, dk2, grad_v, k1, k2, values, q, do, lse, delta, key, at, t_end, hk, score_scale, Hk, G, HEADS, D, DV,
            D1, D2, V1, W, STEP, True,
        )  # fmt: skip
    for at in tl.range(middle, late, STEP):
        dk1, dk2, grad_v = _dkv_step(
            dk1, dk2, grad_v, k1, k2, values, q, do, lse, delta, key, at, t_end, hk, score_scale, Hk, G, HEADS, D, DV,
            D1, D2, V1, W, STEP, False,
        )  # fmt: skip
    for at in tl.range(late, t_end, STEP):
        dk1, dk2, grad_v = _dkv_step(
            dk1, dk2, grad_v, k1, k2, values, q, do, lse, delta, key, at, t_end, hk, score_scale, Hk, G, HEADS, D, DV,
            D1, D2, V1, W, STEP, True,
        )  # fmt: skip
    store_rows(dk, row * D, dk1 * scale, mine, 0, D1, D, False)
    if D2:
        store_rows(dk, row * D, dk2 * scale, mine, D1, D2, D, False)
    store_rows(dv, row * DV, grad_v, mine, 0, V1, DV, False)


# Launch ---------------------------------------------------------------------------------------------------------------


def query_tiles(size: dict[str, int], window: int, wide: bool) -> dict[str, int]:
    """Settings of forward and dQ: 128 rows for 2-byte numbers (`wide` ones take 32) and D + 2 Dv up to 512."""
    rows = (32 if wide else 128) // power_of_two(triton.cdiv(size["D1"] + size["D2"] + 2 * size["V1"], 512))
    TOK = min(TOKEN_TILE, max(1, max(rows, 16) // size["HEADS"]))
    while TOK * size["HEADS"] < 16:
        TOK *= 2
    BN = min(32 if wide else 64, power_of_two(window, 16))
    old = window % BN + TOK - 1
    warps = 8 if TOK * size["HEADS"] >= 128 else 4
    return {"TILE": TOKEN_TILE, "TOK": TOK, "BN": BN, "TAIL": min(BN, power_of_two(old, 16)), "num_warps": warps}


def key_tiles(size: dict[str, int], wide: bool) -> dict[str, int]:
    """Settings of dK/dV: keys of a program and tokens of a step. 128 keys or 64 rows a step would spill at 192/128."""
    narrow = max(1, max(size["D1"] + size["D2"], 2 * size["V1"]) // 256)
    KEYS, rows = max(16, (32 if wide else 64) // narrow), max(16, 32 // narrow)
    return {"KEYS": KEYS, "STEP": max(1, rows // size["HEADS"]), "num_warps": 4 if wide else 8}


def forward(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, spec: NSASpec, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of each query over its window.

    q        [T, Hq, D]
    k, v     [T, Hk, D], [T, Hk, Dv]
    gives o  [T, Hq, Dv]  dtype of q, and lse [T, Hq] fp32: log2 of the sum of 2^(scale log2(e) q . k)
    """
    T, Hq, _ = q.shape
    Hk, Dv = v.shape[1:]
    o = q.new_empty(T, Hq, Dv)
    lse = torch.empty(T, Hq, dtype=torch.float32, device=q.device)
    size = head_sizes(q, v)
    setting = query_tiles(size, spec.window, q.dtype == torch.float32)
    table = documents.token_tiles(TOKEN_TILE)
    M = table.shape[1]
    _win_fwd[(M * (TOKEN_TILE // setting["TOK"]), Hk)](
        q, k, v, o, lse, table, M, scale * LOG2E, **size, W=spec.window, **setting, num_stages=2
    )
    return o, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, documents: Documents, spec: NSASpec,
    scale: float, dq: Tensor, accumulate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the gated window branch; dq is written, or added to with `accumulate`.

    q, k, v     as in `forward`
    do          [T, Hq, Dv]   gradient of the whole op's output
    lse, delta  [T, Hq] fp32  lse - log2(gate), and <do, o_win>
    dq          [T, Hq, D]
    gives dk    [T, Hk, D], dv [T, Hk, Dv]
    """
    Hk = v.shape[1]
    size = head_sizes(q, v)
    wide = q.dtype == torch.float32
    setting = query_tiles(size, spec.window, wide)
    table = documents.token_tiles(TOKEN_TILE)
    M = table.shape[1]
    _win_dq[(M * (TOKEN_TILE // setting["TOK"]), Hk)](
        q, k, v, do, lse, delta, dq, table, M, scale, scale * LOG2E, **size, W=spec.window, **setting, ADD=accumulate,
        num_stages=2,
    )  # fmt: skip
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    setting = key_tiles(size, wide)
    table = documents.token_tiles(setting["KEYS"])
    M = table.shape[1]
    _win_dkv[(M, Hk)](
        q, k, v, do, lse, delta, dk, dv, table, M, scale, scale * LOG2E, **size, W=spec.window, **setting, num_stages=2
    )
    return dk, dv
