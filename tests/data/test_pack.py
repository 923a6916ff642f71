"""Claims about plans: every token once, borders where documents end, rows within limits, and hardly any padding."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_train.bench.data import realistic_lengths
from nsa_train.data.pack import Stretches, documents_in_row, make_plan

KINDS = ("best_fit", "concat", "long")
MANY = settings(max_examples=100, deadline=None)


@st.composite
def cases(draw):
    """(lengths, seq_len, limit, kind, align, long_copies)"""
    align = draw(st.sampled_from([1, 1, 4]))
    return (
        draw(st.lists(st.integers(1, 70), min_size=1, max_size=60)), align * draw(st.integers(1, 40 // align)),
        draw(st.integers(1, 6)), draw(st.sampled_from(KINDS)), align, draw(st.integers(1, 3)),
    )  # fmt: skip


def plan_of(lengths, *rules):
    return make_plan(Stretches.whole(np.array(lengths)), *rules)


def times_seen(pieces, lengths):
    """How often each token of each document lies in a piece."""
    seen = [np.zeros(n, int) for n in lengths]
    for doc, start, length in zip(pieces.doc, pieces.start, pieces.length, strict=True):
        assert 0 <= start < start + length <= lengths[doc]
        seen[doc][start : start + length] += 1
    return seen


@MANY
@given(cases())
def test_every_token_lies_in_one_piece_of_each_copy(case):
    lengths, seq_len, _, kind, _, copies = case
    plan = plan_of(*case)
    for seen, length in zip(times_seen(plan, lengths), lengths, strict=True):
        assert (seen == (copies if kind == "long" and length > seq_len else 1)).all()


@MANY
@given(cases())
def test_no_row_is_too_long_or_holds_too_many_pieces_even_with_the_padding_of_its_pieces(case):
    _, seq_len, limit, _, align, _ = case
    plan = plan_of(*case)
    width = -(-plan.length // align) * align
    for row in range(plan.rows):
        pieces = slice(plan.row_ptr[row], plan.row_ptr[row + 1])
        assert 1 <= len(width[pieces]) <= limit
        assert width[pieces].sum() <= seq_len
        assert plan.row_cost[row] == (plan.length[pieces].astype(int) ** 2).sum()


@MANY
@given(cases())
def test_only_documents_longer_than_a_row_are_cut_and_only_at_multiples_of_align(case):
    lengths, seq_len, _, kind, align, _ = case
    plan = plan_of(*case)
    for doc, start, length in zip(plan.doc, plan.start, plan.length, strict=True):
        assert start % align == 0
        if kind != "concat" and lengths[doc] <= seq_len:
            assert (start, length) == (0, lengths[doc])


@MANY
@given(cases(), st.randoms(use_true_random=False))
def test_a_second_plan_of_what_the_first_rows_left_completes_the_epoch(case, random):
    lengths, seq_len, limit, kind, align, _ = case
    first = plan_of(lengths, seq_len, limit, kind, align, 1)
    read = first.pieces_of(np.array([random.random() < 0.5 for _ in range(first.rows)], bool))
    part = [Stretches(first.doc[m], first.start[m], first.length[m]) for m in (read, ~read)]
    rest = make_plan(Stretches.join([part[1]]), 2 * seq_len, limit, kind, align)
    total = zip(times_seen(part[0], lengths), times_seen(rest, lengths), strict=True)
    assert all((once + again == 1).all() for once, again in total)


def naive_best_fit_rows(lengths, seq_len, limit):
    rows = []  # [free space, pieces]
    for size in sorted(lengths, reverse=True):
        fitting = [row for row in rows if row[0] >= size and row[1] < limit]
        row = min(fitting, key=lambda row: row[0], default=None)
        if row is None:
            rows.append(row := [seq_len, 0])
        row[0] -= size
        row[1] += 1
    return len(rows)


@MANY
@given(st.lists(st.integers(1, 29), min_size=1, max_size=80))
def test_it_uses_as_many_rows_as_best_fit_decreasing_one_document_at_a_time(lengths):
    assert plan_of(lengths, 30, 1000).rows == naive_best_fit_rows(lengths, 30, 1000)


@MANY
@given(st.lists(st.integers(1, 99), min_size=1, max_size=60), st.sampled_from([1, 3]))
def test_long_leaves_no_piece_of_a_long_document_below_half_a_row(lengths, align):
    plan = plan_of(lengths, 30, 1000, "long", align)
    of_long = np.array(lengths)[plan.doc] > 30
    assert (plan.length[of_long] >= 15 - align).all()


def test_concatenation_fills_every_row_but_the_last():
    plan = plan_of([25, 3, 7, 9], 10, 9, "concat")
    assert np.add.reduceat(plan.length, plan.row_ptr[:-1]).tolist() == [10, 10, 10, 10, 4]
    assert plan.doc.tolist() == [0, 0, 0, 1, 2, 2, 3, 3]
    assert plan.start.tolist() == [0, 10, 20, 0, 0, 2, 0, 5]


def test_a_long_document_is_cut_into_full_rows_and_a_rest_with_their_true_places():
    plan = plan_of([25, 3], 10, 4)
    pieces = sorted(zip(plan.doc.tolist(), plan.start.tolist(), plan.length.tolist(), strict=True))
    assert pieces == [(0, 0, 10), (0, 10, 10), (0, 20, 5), (1, 0, 3)]
    assert plan.rows == 3


def test_alignment_is_counted_apart_from_what_packing_wastes():
    plan = plan_of([5, 8, 3], 8, 4, "best_fit", 4)
    assert (plan.rows, plan.utilisation, plan.utilisation_before_alignment) == (3, 16 / 24, 20 / 24)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seq_len", [8192, 32768, 65536])
def test_rows_of_realistic_documents_are_nearly_full(seq_len, kind):
    limit = documents_in_row(64, seq_len)
    plan = make_plan(Stretches.whole(realistic_lengths(200_000)), seq_len, limit, kind)
    assert 0.995 <= plan.utilisation <= 1
    assert np.diff(plan.row_ptr).max() <= limit


def test_a_million_documents_are_planned_in_seconds():
    stretches = Stretches.whole(realistic_lengths(1_000_000))
    begin = time.process_time()
    make_plan(stretches, 8192, 64)
    assert time.process_time() - begin < 3  # 0.3 s on an idle core


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_lengths_give_the_same_plan(kind):
    first, second = (plan_of(realistic_lengths(5000), 4096, 16, kind, 64, 2) for _ in range(2))
    for name in ("doc", "start", "length", "row_ptr"):
        assert np.array_equal(getattr(first, name), getattr(second, name))


def test_the_cap_on_documents_grows_with_rows_beyond_8k():
    assert [documents_in_row(64, n) for n in (512, 8192, 16384, 65536)] == [64, 64, 128, 512]
