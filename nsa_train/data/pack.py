"""Which documents share a row: best-fit decreasing, computed on the histogram of lengths."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """Rows of at most `seq_len` tokens, made of pieces of documents. P pieces, R rows.

    doc      [P]      int32, document of the piece
    start    [P]      int64, place of its first token inside the document; 0 unless the document was cut
    length   [P]      int32, tokens
    row_ptr  [R + 1]  int64, row r holds the pieces row_ptr[r] to row_ptr[r + 1] - 1; its padding lies behind them
    """

    seq_len: int
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
        return self.tokens / (self.rows * self.seq_len)


def make_plan(lengths: np.ndarray, seq_len: int, max_documents: int) -> Plan:
    """Pack documents of `lengths` tokens, int64 [documents], all positive, into rows of seq_len tokens.

    Longer documents are cut into full rows and a rest that is packed like a short document, so every token lies in
    exactly one piece. No row holds more than max_documents pieces. The same arguments give the same plan.
    """
    full, rest = np.divmod(np.asarray(lengths, np.int64), seq_len)
    full_doc = np.repeat(np.arange(len(full)), full)
    full_start = (np.arange(len(full_doc)) - np.repeat(np.cumsum(full) - full, full)) * seq_len

    short = np.flatnonzero(rest)
    short = short[np.argsort(-rest[short], kind="stable")]
    row = len(full_doc) + _best_fit(rest[short], seq_len, max_documents)
    order = np.argsort(row, kind="stable")
    short = short[order]

    pieces_per_row = np.bincount(np.concatenate([np.arange(len(full_doc)), row[order]]))
    return Plan(
        seq_len,
        doc=np.concatenate([full_doc, short]).astype(np.int32),
        start=np.concatenate([full_start, full[short] * seq_len]).astype(np.int64),
        length=np.concatenate([np.full(len(full_doc), seq_len), rest[short]]).astype(np.int32),
        row_ptr=np.concatenate([[0], np.cumsum(pieces_per_row)]).astype(np.int64),
    )


def _best_fit(lengths: np.ndarray, space: int, limit: int) -> np.ndarray:
    """Row of each piece, int64 [P]. `lengths` fall, and each is below `space`; a row takes at most `limit` pieces.

    Best fit puts a piece where least space stays free, so pieces of one length go on filling the row they began. All
    pieces of a length, and all rows that are alike, are therefore handled in one step on ranges: the work grows with
    the number of distinct lengths, not with the number of documents.
    """
    sizes, counts = np.unique(lengths, return_counts=True)
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

    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
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

    first_row, row_count, each = np.array(steps, np.int64).reshape(-1, 3).T
    taken = row_count * each
    step = np.repeat(np.arange(len(steps)), taken)
    within = np.arange(len(step)) - np.repeat(np.cumsum(taken) - taken, taken)
    return first_row[step] + within // each[step]
