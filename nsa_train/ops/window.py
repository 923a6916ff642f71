"""Sliding window (paper section 3.3, branch `win`): query t sees the tokens t - w + 1 ... t of its document.

Reference: `reference.attend` with `reference.win_visible`. Notes: docs/kernels/window.md. Plain Triton for every width,
group size and window; `window_hopper` has the same functions for the shapes that Hopper is tuned for.

    T  tokens, packed    Hq, Hk  query and KV heads    G = Hq // Hk    D, Dv  key and value width    w  window
    D = D0 + D1 in two powers of two (`tiles.split_width`); GP, DVP: G and Dv padded to a power of two

Forward and dQ: a program owns TOK consecutive tokens of one document with the G heads of one KV head: TOK * GP rows,
row r = token r // GP, head r % GP. Its keys are whole tiles that end where its tokens end, so that only the newest needs
the causal mask and most need none, and narrow tiles for the w % BN + TOK - 1 older ones. A program near the start of its
document masks everything. dK and dV: a program owns KEYS keys of one document and one KV head, and walks the tokens
that see them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_train.ops.documents import Documents
from nsa_train.ops.reference import NSASpec
from nsa_train.ops.tiles import LOG2E, power_of_two, split_width

TILE = 64  # tokens of a column of the token table; a program of forward and dQ takes TOK of them
HIDDEN = tl.constexpr(-1.0e30)  # score of a key that is not visible; finite, so that no row computes inf - inf


# Forward --------------------------------------------------------------------------------------------------------------


@triton.jit
def _load(ptr, row, width, d, mask):
    """Rows of a matrix [rows, width], columns d; what the mask hides and columns past the width are 0."""
    return tl.load(ptr + row[:, None] * width + d[None, :], mask=mask[:, None] & (d < width)[None, :], other=0.0)


@triton.jit
def _fwd_step(
    acc, m, l, q0, q1, k, v, t, oldest, doc_start, at, hk, scale, Hk: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys at ... at + BN - 1; MASK where some row does not see all of them."""
    key = at + tl.arange(0, BN)
    there = (key >= doc_start) if MASK else (key >= 0)
    row = key.to(tl.int64) * Hk + hk
    k0 = _load(k, row, D, tl.arange(0, D0), there)
    s = tl.dot(q0, tl.trans(k0), input_precision="ieee")  # [rows, BN]
    if D1:
        k1 = _load(k, row, D, D0 + tl.arange(0, D1), there)
        s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
    s *= scale
    if MASK:
        seen = (key[None, :] >= oldest[:, None]) & (key[None, :] <= t[:, None])
        s = tl.where(seen, s, HIDDEN)
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - m_new[:, None])
    if MASK:
        p = tl.where(seen, p, 0.0)
    shrink = tl.exp2(m - m_new)
    values = _load(v, row, Dv, tl.arange(0, DVP), there)
    acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return acc, m_new, l * shrink + tl.sum(p, 1)


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
    Hk: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, DVP: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr, TOK: tl.constexpr, BN: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    column, part = tl.program_id(0) // (TILE // TOK), tl.program_id(0) % (TILE // TOK)
    hk = tl.program_id(1)
    t0 = tl.load(table + column) + part * TOK
    t1 = tl.minimum(t0 + TOK, tl.load(table + M + column))
    if t0 >= t1:
        return
    doc_start = tl.load(table + 2 * M + column)
    r = tl.arange(0, TOK * GP)
    t = t0 + r // GP
    mine = (t < t1) & (r % GP < G)
    row = t.to(tl.int64) * (Hk * G) + hk * G + r % GP
    q0 = _load(q, row, D, tl.arange(0, D0), mine)
    q1 = q0
    if D1:
        q1 = _load(q, row, D, D0 + tl.arange(0, D1), mine)
    oldest = tl.maximum(t - W + 1, doc_start)
    acc = tl.zeros([TOK * GP, DVP], tl.float32)
    m = tl.full([TOK * GP], HIDDEN, tl.float32)
    l = tl.zeros([TOK * GP], tl.float32)
    old, start, middle = _key_ranges(t1, doc_start, W, TOK, BN, TAIL)
    for at in tl.range(old, start, TAIL):
        acc, m, l = _fwd_step(acc, m, l, q0, q1, k, v, t, oldest, doc_start, at, hk, scale, Hk, D, Dv, D0, D1, DVP, TAIL, True)  # noqa: E501
    for at in tl.range(start, middle, BN):
        acc, m, l = _fwd_step(acc, m, l, q0, q1, k, v, t, oldest, doc_start, at, hk, scale, Hk, D, Dv, D0, D1, DVP, BN, False)  # noqa: E501
    for at in tl.range(middle, t1, BN):
        acc, m, l = _fwd_step(acc, m, l, q0, q1, k, v, t, oldest, doc_start, at, hk, scale, Hk, D, Dv, D0, D1, DVP, BN, True)  # noqa: E501
    l = tl.where(mine, l, 1.0)
    tl.store(lse + row, m + tl.log2(l), mask=mine)
    dv = tl.arange(0, DVP)
    place = o + row[:, None] * Dv + dv[None, :]
    tl.store(place, (acc / l[:, None]).to(o.dtype.element_ty), mask=mine[:, None] & (dv < Dv)[None, :])


# Backward: dQ ---------------------------------------------------------------------------------------------------------


@triton.jit
def _dq_step(
    dq0, dq1, q0, q1, do, lse, delta, k, v, t, oldest, doc_start, at, hk, scale,
    Hk: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DVP: tl.constexpr,
    BN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """dQ += dS K over the keys at ... at + BN - 1, with dS = P' (dO V^T - delta)."""
    key = at + tl.arange(0, BN)
    there = (key >= doc_start) if MASK else (key >= 0)
    row = key.to(tl.int64) * Hk + hk
    k0 = _load(k, row, D, tl.arange(0, D0), there)
    s = tl.dot(q0, tl.trans(k0), input_precision="ieee")  # [rows, BN]
    if D1:
        k1 = _load(k, row, D, D0 + tl.arange(0, D1), there)
        s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
    dp = tl.dot(do, tl.trans(_load(v, row, Dv, tl.arange(0, DVP), there)), input_precision="ieee")
    p = tl.exp2(s * scale - lse[:, None])
    if MASK:
        p = tl.where((key[None, :] >= oldest[:, None]) & (key[None, :] <= t[:, None]), p, 0.0)
    ds = (p * (dp - delta[:, None])).to(k0.dtype)
    dq0 = tl.dot(ds, k0, dq0, input_precision="ieee")
    if D1:
        dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")
    return dq0, dq1


@triton.jit
def _put(ptr, row, width, d, x, mask, ADD: tl.constexpr):
    """Write x into columns d of rows of a matrix [rows, width], or add it to what is there."""
    mask = mask[:, None] & (d < width)[None, :]
    place = ptr + row[:, None] * width + d[None, :]
    if ADD:
        x += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, x.to(ptr.dtype.element_ty), mask=mask)


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
    Hk: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, DVP: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr, TOK: tl.constexpr, BN: tl.constexpr,
    TAIL: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    column, part = tl.program_id(0) // (TILE // TOK), tl.program_id(0) % (TILE // TOK)
    hk = tl.program_id(1)
    t0 = tl.load(table + column) + part * TOK
    t1 = tl.minimum(t0 + TOK, tl.load(table + M + column))
    if t0 >= t1:
        return
    doc_start = tl.load(table + 2 * M + column)
    r = tl.arange(0, TOK * GP)
    t = t0 + r // GP
    mine = (t < t1) & (r % GP < G)
    row = t.to(tl.int64) * (Hk * G) + hk * G + r % GP
    q0 = _load(q, row, D, tl.arange(0, D0), mine)
    q1, dq1 = q0, 0.0
    if D1:
        q1 = _load(q, row, D, D0 + tl.arange(0, D1), mine)
        dq1 = tl.zeros([TOK * GP, D1], tl.float32)
    dq0 = tl.zeros([TOK * GP, D0], tl.float32)
    grad = _load(do, row, Dv, tl.arange(0, DVP), mine)
    row_lse = tl.load(lse + row, mask=mine, other=float("inf"))
    row_delta = tl.load(delta + row, mask=mine, other=0.0)
    oldest = tl.maximum(t - W + 1, doc_start)
    old, start, middle = _key_ranges(t1, doc_start, W, TOK, BN, TAIL)
    for at in tl.range(old, start, TAIL):
        dq0, dq1 = _dq_step(dq0, dq1, q0, q1, grad, row_lse, row_delta, k, v, t, oldest, doc_start, at, hk, score_scale, Hk, D, Dv, D0, D1, DVP, TAIL, True)  # noqa: E501
    for at in tl.range(start, middle, BN):
        dq0, dq1 = _dq_step(dq0, dq1, q0, q1, grad, row_lse, row_delta, k, v, t, oldest, doc_start, at, hk, score_scale, Hk, D, Dv, D0, D1, DVP, BN, False)  # noqa: E501
    for at in tl.range(middle, t1, BN):
        dq0, dq1 = _dq_step(dq0, dq1, q0, q1, grad, row_lse, row_delta, k, v, t, oldest, doc_start, at, hk, score_scale, Hk, D, Dv, D0, D1, DVP, BN, True)  # noqa: E501
    _put(dq, row, D, tl.arange(0, D0), dq0 * scale, mine, ADD)
    if D1:
        _put(dq, row, D, D0 + tl.arange(0, D1), dq1 * scale, mine, ADD)


# Backward: dK and dV --------------------------------------------------------------------------------------------------


@triton.jit
def _dkv_step(
    dk0, dk1, dv, k0, k1, values, q, do, lse, delta, key, at, t_end, hk, score_scale,
    Hk: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, DVP: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """dV += P'^T dO and dK += dS^T Q over the tokens at ... at + STEP - 1; scores are transposed, [keys, rows]."""
    r = tl.arange(0, STEP * GP)
    t = at + r // GP
    there = r % GP < G
    if MASK:
        there = there & (t < t_end)
    row = t.to(tl.int64) * (Hk * G) + hk * G + r % GP
    q0 = _load(q, row, D, tl.arange(0, D0), there)
    s = tl.dot(k0, tl.trans(q0), input_precision="ieee")
    if D1:
        q1 = _load(q, row, D, D0 + tl.arange(0, D1), there)
        s = tl.dot(k1, tl.trans(q1), s, input_precision="ieee")
    p = tl.exp2(s * score_scale - tl.load(lse + row, mask=there, other=float("inf"))[None, :])
    if MASK:
        p = tl.where((key[:, None] <= t[None, :]) & (key[:, None] > t[None, :] - W), p, 0.0)
    grad = _load(do, row, Dv, tl.arange(0, DVP), there)
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
    dp = tl.dot(values, tl.trans(grad), input_precision="ieee")
    ds = (p * (dp - tl.load(delta + row, mask=there, other=0.0)[None, :])).to(q0.dtype)
    dk0 = tl.dot(ds, q0, dk0, input_precision="ieee")
    if D1:
        dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
    return dk0, dk1, dv


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
    Hk: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, DVP: tl.constexpr, W: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    column, hk = tl.program_id(0), tl.program_id(1)
    first = tl.load(table + column)
    last = tl.load(table + M + column) - 1
    if last < first:
        return
    key = first + tl.arange(0, KEYS)
    mine = key <= last
    row = key.to(tl.int64) * Hk + hk
    k0 = _load(k, row, D, tl.arange(0, D0), mine)
    k1, dk1 = k0, 0.0
    if D1:
        k1 = _load(k, row, D, D0 + tl.arange(0, D1), mine)
        dk1 = tl.zeros([KEYS, D1], tl.float32)
    values = _load(v, row, Dv, tl.arange(0, DVP), mine)
    dk0 = tl.zeros([KEYS, D0], tl.float32)
    grad_v = tl.zeros([KEYS, DVP], tl.float32)
    t_end = tl.minimum(last + W, tl.load(table + 3 * M + column))
    # tokens from `first`: some keys are in their future; from `middle`: they see all; from `late`: some keys are too old
    middle = tl.minimum(first + (KEYS + STEP - 2) // STEP * STEP, t_end)
    late = middle + tl.maximum(tl.minimum(first + W, t_end) - middle, 0) // STEP * STEP
    for at in tl.range(first, middle, STEP):
        dk0, dk1, grad_v = _dkv_step(dk0, dk1, grad_v, k0, k1, values, q, do, lse, delta, key, at, t_end, hk, score_scale, Hk, G, GP, D, Dv, D0, D1, DVP, W, STEP, True)  # noqa: E501
    for at in tl.range(middle, late, STEP):
        dk0, dk1, grad_v = _dkv_step(dk0, dk1, grad_v, k0, k1, values, q, do, lse, delta, key, at, t_end, hk, score_scale, Hk, G, GP, D, Dv, D0, D1, DVP, W, STEP, False)  # noqa: E501
    for at in tl.range(late, t_end, STEP):
        dk0, dk1, grad_v = _dkv_step(dk0, dk1, grad_v, k0, k1, values, q, do, lse, delta, key, at, t_end, hk, score_scale, Hk, G, GP, D, Dv, D0, D1, DVP, W, STEP, True)  # noqa: E501
    _put(dk, row, D, tl.arange(0, D0), dk0 * scale, mine, False)
    if D1:
        _put(dk, row, D, D0 + tl.arange(0, D1), dk1 * scale, mine, False)
    _put(dv, row, Dv, tl.arange(0, DVP), grad_v, mine, False)


# Launch ---------------------------------------------------------------------------------------------------------------


def shapes(q: Tensor, v: Tensor, Hk: int) -> dict[str, int]:
    """The sizes all kernels are compiled for."""
    _, Hq, D = q.shape
    D0, D1 = split_width(D)
    G, Dv = Hq // Hk, v.shape[2]
    return dict(Hk=Hk, G=G, GP=power_of_two(G), D=D, Dv=Dv, D0=D0, D1=D1, DVP=power_of_two(Dv, 16))


def query_tiles(size: dict[str, int], window: int, wide: bool) -> dict[str, int]:
    """Settings of forward and dQ: 128 rows for 2-byte numbers (`wide` ones take 32) and widths up to 256."""
    rows = (32 if wide else 128) // max(1, max(size["D0"] + size["D1"], 2 * size["DVP"]) // 256)
    TOK = min(TILE, max(1, max(rows, 16) // size["GP"]))
    while TOK * size["GP"] < 16:
        TOK *= 2
    BN = min(32 if wide else 64, power_of_two(window, 16))
    old = window % BN + TOK - 1
    return dict(
        TILE=TILE, TOK=TOK, BN=BN, TAIL=min(BN, power_of_two(old, 16)), num_warps=8 if TOK * size["GP"] >= 128 else 4
    )


def key_tiles(size: dict[str, int], wide: bool) -> dict[str, int]:
    """Settings of dK/dV: keys of a program and tokens of a step."""
    narrow = max(1, max(size["D0"] + size["D1"], 2 * size["DVP"]) // 256)
    KEYS, rows = max(16, (32 if wide else 64) // narrow), max(16, (32 if wide else 64) // narrow)
    return dict(KEYS=KEYS, STEP=max(1, rows // size["GP"]), num_warps=4)


def forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents, spec: NSASpec, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of each query over its window.

    q        [T, Hq, D]
    k, v     [T, Hk, D], [T, Hk, Dv]
    gives o  [T, Hq, Dv]  dtype of q, and lse [T, Hq] fp32: log2 of the sum of 2^(scale log2(e) q . k)
    """
    T, Hq, _ = q.shape
    Hk, Dv = v.shape[1:]
    o = q.new_empty(T, Hq, Dv)
    lse = torch.empty(T, Hq, dtype=torch.float32, device=q.device)
    size = shapes(q, v, Hk)
    setting = query_tiles(size, spec.window, q.dtype == torch.float32)
    table = documents.token_tiles(TILE)
    M = table.shape[1]
    _win_fwd[(M * (TILE // setting["TOK"]), Hk)](
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
    size = shapes(q, v, Hk)
    wide = q.dtype == torch.float32
    setting = query_tiles(size, spec.window, wide)
    table = documents.token_tiles(TILE)
    M = table.shape[1]
    _win_dq[(M * (TILE // setting["TOK"]), Hk)](
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
