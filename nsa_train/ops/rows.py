"""What the plain Triton kernels of the branches share: pieces of the token table, rows of matrices, rows of queries.

A program of a forward or dQ kernel owns a few tokens of one document with the G heads of one KV head. Its tile has a
row for each: row r is token r // HEADS of the piece, head r % HEADS of the group; HEADS is G padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nsa_train.ops.tiles import power_of_two, split_width


def head_sizes(q: Tensor, v: Tensor) -> dict[str, int]:
    """Sizes that kernels are compiled for, of q [T, Hq, D] and v [rows, Hk, Dv].

    D = D1 + D2 (`split_width`; 0 where one is enough); V1 and HEADS: Dv and G padded to a power of two.
    """
    Hq, D = q.shape[1:]
    Hk, Dv = v.shape[1:]
    D1, D2 = split_width(D)
    return {
        "Hk": Hk, "G": Hq // Hk, "HEADS": power_of_two(Hq // Hk),
        "D": D, "DV": Dv, "D1": D1, "D2": D2, "V1": power_of_two(Dv, 16),
    }  # fmt: skip


@triton.jit
def token_piece(table, M, piece, TOKENS: tl.constexpr, TABLE_TILE: tl.constexpr):
    """(start, end, doc_start, doc_cmp) of piece `piece` of the table, TOKENS tokens at most; empty: start >= end."""
    PER: tl.constexpr = TABLE_TILE // TOKENS
    tile = table + piece // PER
    start = tl.load(tile) + piece % PER * TOKENS
    end = tl.minimum(start + TOKENS, tl.load(tile + M))
    return start, end, tl.load(tile + 2 * M), tl.load(tile + 4 * M)


@triton.jit
def load_rows(ptr, offset, ok, FIRST: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr):
    """Columns FIRST ... FIRST + WIDTH of the rows at `offset`; zeros where not ok and from column END on."""
    column = FIRST + tl.arange(0, WIDTH)
    mask = ok[:, None] if FIRST + WIDTH <= END else ok[:, None] & (column < END)[None, :]
    return tl.load(ptr + offset[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, offset, x, ok, FIRST: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr, ADD: tl.constexpr):
    """Writes x to columns FIRST ... FIRST + WIDTH of the rows at `offset`, or adds it to what is there."""
    column = FIRST + tl.arange(0, WIDTH)
    mask = ok[:, None] & (column < END)[None, :]
    at = ptr + offset[:, None] + column[None, :]
    if ADD:
        x += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def query_rows(
    q, start, end, g, Hk: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """(token, ok, at, q1, q2) of the rows of tokens start ... end of KV head g.

    token: place in the piece; ok: the row has a token and a head; at: its index in [T, Hq], int64; q1, q2: the first D1
    and the next D2 columns of its query (q2 is q1 where D2 is 0).
    """
    row = tl.arange(0, ROWS)
    token, head = row // HEADS, row % HEADS
    ok = (start + token < end) & (head < G)
    at = (start + token).to(tl.int64) * (Hk * G) + g * G + head
    q1 = load_rows(q, at * D, ok, 0, D1, D)
    q2 = load_rows(q, at * D, ok, D1, D2, D) if D2 > 0 else q1
    return token, ok, at, q1, q2
