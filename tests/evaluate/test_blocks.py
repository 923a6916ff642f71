"""Blocks are counted document by document where there is something to choose, and kept for the benchmark."""

import numpy as np
import pytest
import torch

from nsa_train.bench.trained import TrainedBlocks
from nsa_train.data.loader import NO_DOCUMENT, NO_SOURCE, Batch
from nsa_train.evaluate.blocks import KEPT_ROWS, Counts, count_blocks, plot_blocks
from nsa_train.model.attention import Attended
from nsa_train.ops import statistics
from nsa_train.ops.nsa import NSASpec
from nsa_train.ops.reference import select_blocks
from nsa_train.packing import Packing

SPEC = NSASpec(2, 2, slc_block=4, slc_count=4, slc_init=1, slc_local=2, window=4)
FIRST = 16  # n l', a multiple of 8
LENGTHS, REAL = (40, 12, 28, 16), (37, 10, 27)  # of a row's documents, the last one padding; without their padding
ROW, FACT = sum(LENGTHS), 2  # the block that the planted attention looks for


def batch():
    sources = np.full(ROW, NO_SOURCE, np.int32)
    for start, real in zip(np.cumsum([0, *LENGTHS]), REAL, strict=False):
        sources[start : start + real] = 0
    zeros = torch.zeros(ROW, dtype=torch.int64)
    packing = Packing.from_lengths(LENGTHS, 6)
    return Batch(zeros, zeros, packing, torch.from_numpy(sources), zeros.int(), (7, 3, 5, NO_DOCUMENT))


class Planted:
    """Two layers, two KV heads of two query heads; all attention falls on block 2 of a document.

    Layer 0 reads the block from every query, layer 1 from none; its KV head 1 reads the same blocks all the time.
    """

    def __init__(self):
        self.embed, self.layers = torch.nn.Embedding(2, 2), [None, None]
        self.config = type("Config", (), {"kv_heads": 2})

    def watch(self, watcher):
        self.watcher = watcher

    def hidden(self, tokens, packing):
        k = torch.zeros(ROW, 2, 4)
        k[packing.positions // SPEC.slc_block == FACT] = 100.0
        for layer in range(2):
            self.watcher(layer, Attended(torch.ones(ROW, 4, 4), k, self.blocks(layer, packing)))

    def blocks(self, layer, packing):
        parts = []
        for length in packing.lengths:
            scores = torch.rand(length, 2, -(-length // SPEC.slc_block), generator=torch.Generator().manual_seed(0))
            scores[:, 1] = torch.arange(scores.shape[-1], 0, -1)
            scores[..., FACT] = 2**30 if layer == 0 else -1
            parts.append(select_blocks(scores, SPEC))
        return torch.cat(parts)


def test_selection_recall_is_the_attention_that_was_planted():
    counts, _ = count_blocks(Planted(), [batch()], ROW, SPEC)
    whole, *heads = counts.rows()
    queries = [t for length in REAL for t in range(FIRST, length)]
    assert (whole["tokens"], whole["documents"], whole["queries"]) == (sum(REAL), 2, len(queries))
    assert [(head["layer"], head["kv_head"]) for head in heads] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    local = np.array([t // SPEC.slc_block - 1 <= FACT for t in queries])  # block 2 is a forced one
    free = np.array([t // SPEC.slc_block - 2 for t in queries])  # so many blocks can be chosen: one of them is
    for head in heads:
        chosen = np.ones(len(queries)) if head["layer"] == 0 else local
        assert head["selection_recall"] == pytest.approx(chosen.mean(), abs=1e-6)
        assert head["best_recall"] == pytest.approx(1, abs=1e-6)
        assert head["forced_recall"] == pytest.approx(local.mean(), abs=1e-6)
        assert head["random_recall"] == pytest.approx(np.where(local, 1, 1 / free).mean(), abs=1e-6)
    assert whole["selection_recall"] == pytest.approx(np.mean([head["selection_recall"] for head in heads]))


def test_sets_are_counted_inside_documents_and_tiles():
    """Layer 0 always reads block 2 and its forced blocks, so neighbours share all but at the borders of blocks."""
    counts, _ = count_blocks(Planted(), [batch()], ROW, SPEC)
    whole, head, *_ = counts.rows()
    blocks = Planted().blocks(0, batch().packing)[:, 0]
    starts = (0, LENGTHS[0] + LENGTHS[1])
    spans = [range(start + FIRST, start + real) for start, real in zip(starts, (REAL[0], REAL[2]), strict=True)]
    of = {t: set(blocks[t].tolist()) - {-1} for span in spans for t in span}
    for n in (2, 4, 8):
        groups = [span[i : i + n] for span in spans for i in range(0, len(span) - n + 1, n)]
        want = np.mean([len(set.union(*(of[t] for t in group))) for group in groups])
        assert head["distinct_blocks"][str(n)] == pytest.approx(want)
    shared = [len(of[t] & of[t + 1]) / SPEC.slc_count for span in spans for t in span[:-1]]
    assert head["neighbour_overlap"] == pytest.approx(np.mean(shared))
    existing = [t // SPEC.slc_block + 1 for length in REAL for t in range(length)]
    assert whole["forced_share"] == pytest.approx(np.minimum(existing, 3).sum() / np.minimum(existing, 4).sum())


def test_distances_are_counted_and_set_beside_those_of_chance():
    counts, _ = count_blocks(Planted(), [batch()], ROW, SPEC)
    whole, *heads = counts.rows()
    owns = np.array([t // SPEC.slc_block for length in REAL for t in range(FIRST, length)])
    back = np.where(owns - FACT < SPEC.slc_local, 0, owns - FACT)
    assert list(whole["distance"]) == ["4-8", "8-16", "16-32", "32-64", "64-128"]
    for name, share in heads[0]["distance"].items():
        low, high = (int(edge) // 4 for edge in name.split("-"))
        exact = ((back >= low) & (back < high)).mean()
        assert share >= exact - 1e-9  # where block 2 is a forced one, another is chosen
        odds = [np.mean([low <= d < high for d in range(SPEC.slc_local, own)]) for own in owns]
        assert whole["distance_random"][name] == pytest.approx(np.mean(odds))
    assert sum(heads[0]["distance"].values()) == pytest.approx(1)


def test_without_a_long_document_nothing_is_counted():
    counts = Counts(1, 2, 64, SPEC, torch.device("cpu"))
    counts.add_document(FIRST)
    assert (counts.queries, counts.tokens) == (0, FIRST)
    counts.add_document(FIRST + 1)
    assert (counts.queries, counts.documents) == (1, 1)


def test_the_first_rows_blocks_are_kept_as_the_model_chose_them():
    _, kept = count_blocks(Planted(), [batch()] * (KEPT_ROWS + 2), ROW, SPEC)
    one = torch.stack([Planted().blocks(layer, batch().packing) for layer in (0, 1)]).numpy()
    assert kept.blocks.dtype == np.int16
    assert np.array_equal(kept.blocks, np.concatenate([one] * KEPT_ROWS, 1))
    assert kept.cu_seqlens.tolist() == np.cumsum([0, *LENGTHS * KEPT_ROWS]).tolist()
    assert (kept.layers.tolist(), kept.spec) == ([0, 1], SPEC)
    assert isinstance(kept, TrainedBlocks)


def test_the_figure_is_drawn(tmp_path):
    counts, _ = count_blocks(Planted(), [batch()], ROW, SPEC)
    plot_blocks(list(counts.rows()), "title", tmp_path / "blocks.png")
    assert (tmp_path / "blocks.png").read_bytes()[:4] == b"\x89PNG"


def test_the_planted_attention_lies_where_it_was_planted():
    k = torch.zeros(20, 2, 4)
    k[8:12] = 100.0
    ((_, p),) = statistics.full_attention(torch.ones(20, 4, 4), k)
    assert p[..., 12:, 8:12].sum(-1).min() > 1 - 1e-6
