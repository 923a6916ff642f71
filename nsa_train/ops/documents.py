"""Where documents, their tiles and their compressed keys lie, computed on the device without asking it anything.

Kernels work on tiles that restart at each document, so positions inside a document are all they know and no mask
between documents exists. How many tiles there are depends on T and N only: a table has room for the worst case, and its
unused entries are empty.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_train.ops.reference import NSASpec

TOKEN_TILE = 64  # tokens in a tile of the table that forward and dQ kernels take pieces of
COPIED = 2048  # elements that a program copies
COLUMNS = 6  # start, end, doc_start, doc_end, doc_cmp, doc_tile


@triton.jit
def _keys_of(length, CMP_BLOCK: tl.constexpr, CMP_STRIDE: tl.constexpr):
    """Compressed keys of documents of `length` tokens; `compressed_lengths` in a kernel."""
    return tl.where(length >= CMP_BLOCK, (length - CMP_BLOCK) // CMP_STRIDE + 1, 0)


@triton.jit
def _tile_table(
    cu_seqlens, table, N, M,
    SIZE: tl.constexpr, CMP_BLOCK: tl.constexpr, CMP_STRIDE: tl.constexpr, OF_KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i writes the tiles of document i; program N empties the entries behind the last tile."""
    doc = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    first = 0  # tiles of the documents before this one
    doc_cmp = 0  # compressed keys of the documents before this one
    for at in range(0, doc, BLOCK):
        before = at + i < doc
        begin = tl.load(cu_seqlens + at + i, mask=before, other=0)
        length = tl.load(cu_seqlens + at + i + 1, mask=before, other=0) - begin
        keys = _keys_of(length, CMP_BLOCK, CMP_STRIDE)
        doc_cmp += tl.sum(keys, 0)
        first += tl.sum(((keys if OF_KEYS else length) + SIZE - 1) // SIZE, 0)
    if doc < N:
        doc_start = tl.load(cu_seqlens + doc)
        doc_end = tl.load(cu_seqlens + doc + 1)
        length = doc_end - doc_start
        keys = _keys_of(length, CMP_BLOCK, CMP_STRIDE)
        origin = doc_cmp if OF_KEYS else doc_start
        rows = keys if OF_KEYS else length
        for at in range(0, (rows + SIZE - 1) // SIZE, BLOCK):
            tile = at + i
            start = origin + tile * SIZE
            mine = start < origin + rows
            place = table + first + tile
            tl.store(place, start, mask=mine)
            tl.store(place + M, tl.minimum(start + SIZE, origin + rows), mask=mine)
            tl.store(place + 2 * M, doc_start + 0 * tile, mask=mine)
            tl.store(place + 3 * M, doc_end + 0 * tile, mask=mine)
            tl.store(place + 4 * M, doc_cmp + 0 * tile, mask=mine)
            tl.store(place + 5 * M, first + 0 * tile, mask=mine)
    else:
        for at in range(first, M, BLOCK):
            for column in tl.static_range(6):
                tl.store(table + column * M + at + i, 0 * i, mask=at + i < M)


@triton.jit
def _copy_used_rows(
    cu_seqlens, x, out, N, WIDTH, ELEMENTS,
    CMP_BLOCK: tl.constexpr, CMP_STRIDE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out, ELEMENTS in rows of WIDTH: the rows of x that are compressed keys of a document, zeros behind them."""
    used = 0
    for at in range(0, N, BLOCK):
        i = at + tl.arange(0, BLOCK)
        there = i < N
        begin = tl.load(cu_seqlens + i, mask=there, other=0)
        used += tl.sum(_keys_of(tl.load(cu_seqlens + i + 1, mask=there, other=0) - begin, CMP_BLOCK, CMP_STRIDE), 0)
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    kept = tl.load(x + place, mask=place < used * WIDTH, other=0.0)
    tl.store(out + place, kept, mask=place < ELEMENTS)


def compressed_lengths(cu_seqlens: Tensor, spec: NSASpec) -> Tensor:
    """Compressed keys of each document, int32 [N]: (L - l) // d + 1 where L >= l, else 0."""
    lengths = cu_seqlens.diff()
    return torch.where(lengths >= spec.cmp_block, (lengths - spec.cmp_block) // spec.cmp_stride + 1, 0).to(torch.int32)


class Documents:
    """The documents of a packed sequence as kernels read them.

    A table is int32 [6, M], one column a tile:
        start, end          rows of the tile; empty (0, 0) behind the last one
        doc_start, doc_end  tokens of the tile's document
        doc_cmp             row of the document's first compressed key
        doc_tile            column of the document's first tile
    """

    def __init__(self, cu_seqlens: Tensor, T: int, spec: NSASpec) -> None:
        self.cu_seqlens, self.tokens, self.spec = cu_seqlens, T, spec
        self._tables: dict[tuple[int, bool], Tensor] = {}

    def used_rows(self, x: Tensor) -> Tensor:
        """A copy of compressed keys or values [rows, Hk, width], zeros behind the documents' last one."""
        out = torch.empty_like(x)
        if x.numel():
            _copy_used_rows[(triton.cdiv(x.numel(), COPIED),)](
                self.cu_seqlens, x, out, self.cu_seqlens.numel() - 1, x.numel() // len(x), x.numel(),
                self.spec.cmp_block, self.spec.cmp_stride, BLOCK=128, TILE=COPIED,
            )  # fmt: skip
        return out

    def token_tiles(self, size: int) -> Tensor:
        """Tiles of `size` tokens; M = T // size + N."""
        return self._table(size, self.tokens, of_keys=False)

    def key_tiles(self, size: int) -> Tensor:
        """Tiles of `size` compressed keys; `start` and `end` are rows of k_cmp. M = (T // cmp_stride) // size + N."""
        return self._table(size, self.tokens // self.spec.cmp_stride, of_keys=True)

    def _table(self, size: int, rows: int, of_keys: bool) -> Tensor:
        if (size, of_keys) not in self._tables:
            N = self.cu_seqlens.numel() - 1
            M = rows // size + N
            table = torch.empty(COLUMNS, M, dtype=torch.int32, device=self.cu_seqlens.device)
            _tile_table[(N + 1,)](
                self.cu_seqlens, table, N, M, size, self.spec.cmp_block, self.spec.cmp_stride, of_keys, BLOCK=128
            )
            self._tables[size, of_keys] = table
        return self._tables[size, of_keys]
