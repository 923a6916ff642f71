"""Held-out loss as a whole is the weighted mean of its parts."""

import pytest

from nsa_train.train.evaluate import position_buckets


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
