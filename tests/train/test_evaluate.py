"""Buckets of positions, and how far back a token's four-token context stood before."""

import numpy as np
import pytest

from nsa_train.train.evaluate import position_buckets
from nsa_train.train.heldout import recall_distances


@pytest.mark.parametrize(
    ("seq_len", "buckets"),
    [
        (96, [(0, 96)]),
        (128, [(0, 128)]),
        (129, [(0, 128), (128, 129)]),
        (512, [(0, 128), (128, 256), (256, 512)]),
        (1000, [(0, 128), (128, 256), (256, 512), (512, 1000)]),
    ],
)
def test_buckets_are_powers_of_two_that_cover_the_row(seq_len, buckets):
    assert position_buckets(seq_len) == buckets


def test_the_last_bucket_of_distances_ends_with_the_row():
    assert position_buckets(8192, 512)[-2:] == [(2048, 4096), (4096, 8192)]
    assert position_buckets(512, 64) == [(0, 64), (64, 128), (128, 256), (256, 512)]


@pytest.mark.parametrize(("length", "vocab"), [(1, 5), (4, 2), (5, 1), (300, 3), (200, 2**17)])
def test_recall_distances_are_those_of_a_search(length, vocab):
    tokens = np.random.default_rng(length).integers(0, vocab, length)
    tokens[length // 2 :] = tokens[: length - length // 2]
    found = recall_distances(tokens)
    for t in range(length):
        before = [s for s in range(1, t - 2) if (tokens[t - 3 : t + 1] == tokens[t - 3 - s : t + 1 - s]).all()]
        assert found[t] == (before[0] if before else 0), t
    assert length < 5 or found.any()
