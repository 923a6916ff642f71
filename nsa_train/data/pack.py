"""Which stretches of documents share a row: best fit, concatenation, or long documents first. No token is copied."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

Kind = Literal["best_fit", "concat", "long"]
PACKING_KEYS = ("packing", "max_documents", "align", "long_copies")  # of `data`: with a row's length they decide a plan
REFERENCE_ROW_TOKENS = 8192  # the row that `data.max_documents` speaks of


@dataclass(frozen=True)
class Stretches:
    """Parts of documents that are to be read, [S] each: doc int32, start int64 inside the document, length int64."""

    doc: np.ndarray
    start: np.ndarray
    length: np.ndarray

    @staticmethod
    def whole(lengths: np.ndarray, documents: np.ndarray | None = None) -> Stretches:
        """All tokens of the given documents, by default of all; lengths int64 [all documents], positive."""
        documents = np.arange(len(lengths)) if documents is None else documents
        return Stretches(
            documents.astype(np.int32), np.zeros(len(documents), np.int64), np.asarray(lengths, np.int64)[documents]
        )

    @staticmethod
    def join(parts: list[Stretches]) -> Stretches:
        """All of them, those that touch made one, by document and place."""
        doc, start, length = (
            np.concatenate([getattr(part, key) for part in parts]) for key in ("doc", "start", "length")
        )
        order = np.lexsort((start, doc))
        doc, start, length = doc[order], start[order], length[order].astype(np.int64)
        touches = (doc[1:] == doc[:-1]) & (start[1:] == start[:-1] + length[:-1])
        first = np.flatnonzero(np.concatenate([[True], ~touches])) if len(doc) else np.zeros(0, np.int64)
        return Stretches(doc[first], start[first], np.add.reduceat(length, first) if len(doc) else length)

    def only(self, chosen: np.ndarray) -> Stretches:
        """Those that a mask or an index names."""
        return Stretches(self.doc[chosen], self.start[chosen], self.length[chosen])

    @property
    def tokens(self) -> int:
        return int(self.length.sum())


@dataclass(frozen=True)
class Plan:
    """Rows of at most `seq_len` tokens, made of pieces of documents. P pieces, R rows.

    doc      [P]      int32, document of the piece
    start    [P]      int64, place of its first token inside the document; 0 unless the document was cut
    length   [P]      int32, tokens; the piece takes that many places, rounded up to a multiple of `align`
    row_ptr  [R + 1]  int64, row r holds the pieces row_ptr[r] to row_ptr[r + 1] - 1; its padding lies behind them
    """

    seq_len: int
    align: int
    doc: np.ndarray
    start: np.ndarray
    length: np.ndarray
    row_ptr: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.row_ptr) - 1

    @property
    def tokens(self) -> int:
        return int(self.length.sum(dtype=np.int64))

    @property
    def utilisation(self) -> float:
        """Share of the rows' places that hold a token, 0 to 1."""
        return self.tokens / max(self.rows * self.seq_len, 1)

    @property
    def utilisation_before_alignment(self) -> float:
        """The same, the padding at the ends of documents counted as if it were tokens."""
        return int(aligned(self.length, self.align).sum(dtype=np.int64)) / max(self.rows * self.seq_len, 1)

    @cached_property
    def row_cost(self) -> np.ndarray:
        """Sum of the squared lengths of a row's pieces, int64 [R].

        That is the work of full attention. NSA's is a part that grows with the tokens, and is the same for all full
        rows, and a smaller multiple of this (its compressed keys), so both put rows in the same order.
        """
        return self._sum_of_rows(self.length.astype(np.int64) ** 2)

    def pieces_of(self, chosen: np.ndarray) -> np.ndarray:
        """Mask [P] of the pieces in the rows that a mask [R] names."""
        return np.repeat(chosen, np.diff(self.row_ptr))

    def _sum_of_rows(self, values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, self.row_ptr[:-1]) if len(values) else np.zeros(0, np.int64)


def aligned(length: np.ndarray, align: int) -> np.ndarray:
    """Lengths rounded up to multiples of `align`."""
    return length if align == 1 else -(-length // align) * align


def documents_in_row(max_documents: int, seq_len: int) -> int:
    """The most documents in a row of seq_len tokens: `data.max_documents`, in rows beyond 8192 tokens in proportion."""
    return max_documents * max(1, seq_len // REFERENCE_ROW_TOKENS)


def make_plan(
    stretches: Stretches, seq_len: int, limit: int, kind: Kind = "best_fit", align: int = 1, long_copies: int = 1
) -> Plan:
    """Pack stretches into rows of seq_len tokens, a multiple of `align`, with at most `limit` pieces each.

    best_fit  a stretch that is longer than a row becomes full rows and a rest; then the fullest rows that can be made
    concat    one stretch behind the other, cut where a row ends
    long      best_fit, but no piece of a stretch longer than a row is shorter than half a row (its last two pieces
              share evenly what is left; short stretches fill the gaps), and such a stretch occurs `long_copies` times

    Every token lies in exactly one piece of each copy. The same arguments give the same plan.
    """
    if kind == "concat":
        return _concatenate(stretches, seq_len, limit, align)
    if kind == "long" and long_copies > 1:
        copies = np.where(stretches.length > seq_len, long_copies, 1)
        stretches = stretches.only(np.repeat(np.arange(len(copies)), copies))
    pieces = _cut(stretches, seq_len, align if kind == "long" else None)
    width = aligned(pieces.length, align)
    alone, shared = np.flatnonzero(width == seq_len), np.flatnonzero(width < seq_len)
    shared = shared[_stable_order(seq_len - width[shared], seq_len)]
    row = _best_fit(width[shared], seq_len, limit)
    rows = int(row.max()) + 1 if len(row) else 0
    in_rows = shared[_stable_order(row, rows)]
    per_row = np.concatenate([np.ones(len(alone), np.int64), np.bincount(row, minlength=rows)])
    return _plan(pieces.only(np.concatenate([alone, in_rows])), per_row, seq_len, align)


def _plan(pieces: Stretches, per_row: np.ndarray, seq_len: int, align: int) -> Plan:
    row_ptr = np.concatenate([[0], np.cumsum(per_row)]).astype(np.int64)
    return Plan(seq_len, align, pieces.doc, pieces.start, pieces.length.astype(np.int32), row_ptr)


def _cut(stretches: Stretches, seq_len: int, even_align: int | None) -> Stretches:
    """Pieces of at most seq_len tokens; with `even_align` the last two share a rest below half a row evenly."""
    long = stretches.length > seq_len
    if not long.any():
        return stretches
    short, cut = np.flatnonzero(~long), stretches.only(long)
    count = -(-cut.length // seq_len)
    of = np.repeat(np.arange(len(count)), count)
    last = np.cumsum(count) - 1
    start = (np.arange(len(of)) - (last + 1 - count)[of]) * seq_len
    length = np.minimum(seq_len, cut.length[of] - start)
    if even_align is not None:
        end = last[length[last] < seq_len // 2]
        both = length[end] + seq_len
        half = aligned(-(-both // 2), even_align)
        length[end - 1], length[end], start[end] = half, both - half, start[end - 1] + half
    return Stretches(
        np.concatenate([cut.doc[of], stretches.doc[short]]),
        np.concatenate([cut.start[of] + start, stretches.start[short]]),
        np.concatenate([length.astype(np.int32), stretches.length[short].astype(np.int32)]),
    )


def _concatenate(stretches: Stretches, seq_len: int, limit: int, align: int) -> Plan:
    end = np.cumsum(aligned(stretches.length, align))
    begin = end - aligned(stretches.length, align)
    first_row = begin // seq_len
    count = -(-end // seq_len) - first_row
    of = np.repeat(np.arange(len(count)), count)
    row = first_row[of] + np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)
    from_, to = np.maximum(begin[of], row * seq_len), np.minimum(end[of], (row + 1) * seq_len)
    start = from_ - begin[of]
    length = np.minimum(to - begin[of], stretches.length[of]) - start
    pieces = Stretches(stretches.doc[of], stretches.start[of] + start, length)
    in_row = np.bincount(row)
    number = np.arange(len(row)) - np.repeat(np.cumsum(in_row) - in_row, in_row)
    new_row = np.cumsum(number % limit == 0) - 1  # a row beyond the limit goes on in a further, padded one
    return _plan(pieces, np.bincount(new_row), seq_len, align)


def _stable_order(values: np.ndarray, below: int) -> np.ndarray:
    """argsort(kind="stable") of integers in [0, below], by counting 16 bits at a time: ten times as fast."""
    order = np.argsort(values.astype(np.uint16), kind="stable")
    for shift in range(16, int(below).bit_length(), 16):
        order = order[np.argsort((values[order] >> shift).astype(np.uint16), kind="stable")]
    return order


def _best_fit(lengths: np.ndarray, space: int, limit: int) -> np.ndarray:
    """Row of each piece, int32 [P]. `lengths` fall, and each is below `space`; a row takes at most `limit` pieces.

    Best fit puts a piece where least space stays free, so pieces of one length go on filling the row they began. All
    pieces of a length, and all rows that are alike, are therefore handled in one step on ranges: the work grows with
    the number of distinct lengths, not with the number of documents.
    """
    counts = np.bincount(lengths)
    open_rows: dict[int, list[tuple[int, int, int]]] = {}  # free space -> (first row, rows, pieces in each)
    spaces: list[int] = []  # the keys of open_rows, rising
    steps: list[tuple[int, int, int]] = []  # first row, rows, pieces put into each; in the order of the pieces
    made = 0

    def put(first: int, rows: int, free: int, inside: int, size: int, pieces: int) -> int:
        """Fill a range of like rows with up to `pieces` of `size`; gives how many it took."""
        most = min(free // size, limit - inside)
        filled, remainder = divmod(min(pieces, most * rows), most)
        partial = min(remainder, 1)
        untouched = rows - filled - partial
        ranges = ((filled, most), (partial, remainder), (untouched, 0))
        for number, each in ranges:
            if number and each:
                steps.append((first, number, each))
            left = free - each * size
            if number and left and inside + each < limit:
                if left not in open_rows:
                    open_rows[left] = []
                    insort(spaces, left)
                open_rows[left].append((first, number, inside + each))
            first += number
        return filled * most + remainder

    for size in np.flatnonzero(counts)[::-1].tolist():
        count = int(counts[size])
        while count:
            at = bisect_left(spaces, size)
            if at < len(spaces):
                free = spaces[at]
                first, rows, inside = open_rows[free].pop()
                if not open_rows[free]:
                    del open_rows[free], spaces[at]
            else:
                most = min(space // size, limit)
                first, rows, free, inside = made, -(-count // most), space, 0
                made += rows
            count -= put(first, rows, free, inside, size, count)

    first_row, row_count, each = np.array(steps, np.int32).reshape(-1, 3).T
    taken = row_count * each
    before = np.cumsum(taken) - taken
    within = np.arange(len(lengths), dtype=np.int32) - np.repeat(before.astype(np.int32), taken)
    return np.repeat(first_row, taken) + within // np.repeat(each, taken)
