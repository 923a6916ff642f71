"""The three numbers of a selection, on cases small enough to count by hand."""

import pytest
import torch

from nsa_train.ops.nsa import NSASpec
from nsa_train.ops.statistics import selection_statistics

SPEC = NSASpec(1, 1, slc_block=2, slc_count=3, slc_init=0, slc_local=1, window=1)


def statistics(blocks, spec=SPEC, seed=None):
    """blocks: a list of chosen blocks for each query; without a seed all keys get the same attention."""
    rows = [row + [-1] * (spec.slc_count - len(row)) for row in blocks]
    blocks = torch.tensor(rows, dtype=torch.int32)[:, None]
    generator = torch.Generator().manual_seed(seed or 0)
    q, k, v = (torch.randn(len(rows), 1, 4, generator=generator) for _ in range(3))
    return selection_statistics(q * (seed is not None), k, v, blocks, spec)


def test_forced_blocks_alone_hold_all_the_mass_and_reach_nowhere():
    found = statistics([[t // 2] for t in range(6)], seed=1)
    assert found["forced_mass"] == pytest.approx(1)
    assert found["distance_tokens"] == 0


def test_every_block_chosen_by_hand():
    found = statistics([list(range(t // 2 + 1)) for t in range(6)])
    assert found["forced_mass"] == pytest.approx((1 / 1 + 2 / 2 + 1 / 3 + 2 / 4 + 1 / 5 + 2 / 6) / 6)
    assert found["distance_tokens"] == pytest.approx((2 + 2 + (4 + 2) + (4 + 2)) / 6)
    assert found["neighbour_overlap"] == 1


def test_the_forced_first_block_is_not_free():
    spec = NSASpec(1, 1, slc_block=2, slc_count=3, slc_init=1, slc_local=1, window=1)
    found = statistics([[0], [0], [0, 1], [0, 1], [0, 1, 2], [0, 1, 2]], spec)
    assert found["forced_mass"] == pytest.approx((1 + 1 + 1 + 1 + 3 / 5 + 4 / 6) / 6)
    assert found["distance_tokens"] == pytest.approx(2)


def test_overlap_counts_the_blocks_that_the_next_query_reads_too():
    found = statistics([[0], [0], [1], [0, 1], [2], [0, 1, 2]])
    assert found["neighbour_overlap"] == pytest.approx((1 + 0 + 1 + 0 + 1) / (1 + 1 + 1 + 2 + 1))


def test_a_single_token_has_statistics():
    assert statistics([[0]]) == {"forced_mass": 1.0, "distance_tokens": 0.0, "neighbour_overlap": 0.0}
