"""Claims about plans: every token once, rows within their limits, and hardly any padding."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_train.data.pack import make_plan


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=60), st.integers(1, 40), st.integers(1, 6)
)  # fmt: skip
def test_every_token_lies_in_one_piece_and_rows_keep_their_limits(lengths, seq_len, max_documents):
    plan = make_plan(np.array(lengths), seq_len, max_documents)
    seen = [np.zeros(n, int) for n in lengths]
    for doc, start, length in zip(plan.doc, plan.start, plan.length, strict=True):
        assert start + length <= lengths[doc]
        seen[doc][start : start + length] += 1
    assert all((count == 1).all() for count in seen)
    for row in range(plan.rows):
        pieces = slice(plan.row_ptr[row], plan.row_ptr[row + 1])
        assert 1 <= len(plan.length[pieces]) <= max_documents
        assert plan.length[pieces].sum() <= seq_len
    assert plan.tokens == sum(lengths)


def naive_best_fit_rows(lengths, seq_len, max_documents):
    rows = []  # [free space, pieces]
    for size in sorted(lengths, reverse=True):
        fitting = [row for row in rows if row[0] >= size and row[1] < max_documents]
        row = min(fitting, key=lambda row: row[0], default=None)
        if row is None:
            rows.append(row := [seq_len, 0])
        row[0] -= size
        row[1] += 1
    return len(rows)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 29), min_size=1, max_size=80))
def test_it_uses_as_many_rows_as_best_fit_decreasing_one_document_at_a_time(lengths):
    assert make_plan(np.array(lengths), 30, 1000).rows == naive_best_fit_rows(lengths, 30, 1000)


def realistic_lengths(documents):
    """A log-normal body, median 570 and mean about 1,750 tokens, as web text has."""
    return np.maximum(2, np.exp(np.random.default_rng(0).normal(np.log(570), 1.5, documents))).astype(np.int64)


@pytest.mark.parametrize(
    ("seq_len", "max_documents", "least"), [(8192, 64, 0.99), (65536, 512, 0.99), (8192, 9999, 0.9999)]
)
def test_rows_of_realistic_documents_are_nearly_full(seq_len, max_documents, least):
    plan = make_plan(realistic_lengths(100_000), seq_len, max_documents)
    assert least < plan.utilisation <= 1
    assert np.diff(plan.row_ptr).max() <= max_documents


def test_a_million_documents_are_planned_in_seconds():
    lengths = realistic_lengths(1_000_000)
    begin = time.process_time()
    make_plan(lengths, 8192, 64)
    assert time.process_time() - begin < 5  # 0.3 s on an idle core


def test_a_long_document_is_cut_into_full_rows_and_a_rest_with_their_true_places():
    plan = make_plan(np.array([25, 3]), 10, 4)
    pieces = sorted(zip(plan.doc.tolist(), plan.start.tolist(), plan.length.tolist(), strict=True))
    assert pieces == [(0, 0, 10), (0, 10, 10), (0, 20, 5), (1, 0, 3)]
    assert plan.rows == 3


def test_the_same_lengths_give_the_same_plan():
    first, second = (make_plan(realistic_lengths(5000), 4096, 16) for _ in range(2))
    for name in ("doc", "start", "length", "row_ptr"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
