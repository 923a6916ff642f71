"""Tile tables: every token and every compressed key lies in exactly one tile of its own document."""

from itertools import pairwise

import pytest
import torch

from nsa_train.ops.documents import Documents
from nsa_train.ops.nsa import NSASpec, compressed_lengths
from nsa_train.packing import Packing

SPEC = NSASpec(cmp_block=8, cmp_stride=4, slc_block=8, window=16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKS = [[1], [7], [8, 9], [64, 63, 65, 1, 200], [600]]


def table_by_loop(starts, ends, rows, size):
    """[(start, end, doc_start, doc_end, doc_cmp, doc_tile)] of every tile, in order."""
    tiles = []
    doc_cmp = 0
    for (doc_start, doc_end), (row, row_end), keys in zip(pairwise(starts), ends, rows, strict=True):
        doc_tile = len(tiles)
        for start in range(row, row_end, size):
            tiles.append((start, min(start + size, row_end), doc_start, doc_end, doc_cmp, doc_tile))
        doc_cmp += keys
    return tiles


@pytest.mark.parametrize(
    ("lengths", "empty", "size"),
    [*((lengths, empty, size) for lengths in PACKS for empty in (0, 3) for size in (4, 64)), ([1] * 130 + [70], 0, 64)],
    ids=lambda x: f"{len(x)}docs{sum(x)}" if isinstance(x, list) else x,
)
@pytest.mark.parametrize("of_keys", [False, True])
def test_every_row_lies_in_one_tile_of_its_document(lengths, size, of_keys, empty):
    packing = Packing.from_lengths(lengths, len(lengths) + empty).to(DEVICE)
    documents = Documents(packing.cu_seqlens, packing.tokens, SPEC)
    keys = compressed_lengths(packing.cu_seqlens, SPEC).tolist()
    bounds = packing.cu_seqlens.tolist()
    first_keys = [sum(keys[:i]) for i in range(len(keys) + 1)]
    ranges = list(pairwise(first_keys if of_keys else bounds))
    want = table_by_loop(bounds, ranges, keys, size)
    got = documents.key_tiles(size) if of_keys else documents.token_tiles(size)
    assert len(want) <= got.shape[1]
    assert got.T.tolist() == [list(tile) for tile in want] + [[0] * 6] * (got.shape[1] - len(want))


def test_the_number_of_tiles_depends_on_sizes_only():
    shapes = {
        Documents(Packing.from_lengths(lengths, 5).cu_seqlens.to(DEVICE), 640, SPEC).token_tiles(64).shape
        for lengths in ([640], [1, 1, 1, 1, 636], [128] * 5, [63, 577])
    }
    assert shapes == {(6, 15)}


@pytest.mark.parametrize("lengths", PACKS, ids=lambda x: f"{len(x)}docs{sum(x)}")
def test_rows_behind_the_last_compressed_key_are_zeros_in_the_copy(lengths):
    packing = Packing.from_lengths(lengths, len(lengths) + 2).to(DEVICE)
    used = int(compressed_lengths(packing.cu_seqlens, SPEC).sum())
    x = torch.randn(packing.tokens // SPEC.cmp_stride, 3, 5, device=DEVICE)
    x[used:] = torch.nan
    copy = Documents(packing.cu_seqlens, packing.tokens, SPEC).used_rows(x)
    assert torch.equal(copy[:used], x[:used])
    assert not copy[used:].any()
