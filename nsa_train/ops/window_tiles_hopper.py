"""What the Hopper kernels of the window share: the walk over work items, and the keys of an item."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from nsa_train.ops.tiles_hopper import token_piece

TAIL = 16  # keys of the narrow tile


@gluon.jit
def work_item(table, M, item, Hk: gl.constexpr, W: gl.constexpr, KEYS: gl.constexpr):
    """(KV head, start, end, doc_start, n, n_inside, tail) of a piece of 8 tokens times a KV head.

    n: tiles of KEYS keys that end at `end`; n_inside: those that lie in the document; tail: 1 if some token sees keys
    before `end` - W. An empty piece (start >= end) has one tile, that no row sees: a branch would cost more.
    """
    start, end, doc_start, _ = token_piece(table, M, item // Hk)
    length = gl.where(start < end, end - doc_start, 1)
    n = gl.minimum((length + KEYS - 1) // KEYS, W // KEYS)
    n_inside = gl.minimum(length // KEYS, n)
    tail = gl.where((length > W) & (end - start > 1), 1, 0)
    return item % Hk, start, end, doc_start, n, n_inside, tail
