"""Statistics of a selection, on cases small enough to count by hand or to search."""

from itertools import combinations

import numpy as np
import pytest
import torch

from nsa_train.ops import statistics
from nsa_train.ops.fixed_blocks import fixed_blocks
from nsa_train.ops.nsa import NSASpec
from nsa_train.ops.reference import attend
from nsa_train.ops.statistics import selection_statistics

SPEC = NSASpec(1, 1, slc_block=2, slc_count=3, slc_init=0, slc_local=1, window=1)


def numbers(blocks, spec=SPEC, seed=None):
    """blocks: a list of chosen blocks for each query; without a seed all keys get the same attention."""
    rows = [row + [-1] * (spec.slc_count - len(row)) for row in blocks]
    blocks = torch.tensor(rows, dtype=torch.int32)[:, None]
    generator = torch.Generator().manual_seed(seed or 0)
    q, k, v = (torch.randn(len(rows), 1, 4, generator=generator) for _ in range(3))
    return selection_statistics(q * (seed is not None), k, v, blocks, spec)


def test_forced_blocks_alone_hold_all_the_mass_and_reach_nowhere():
    found = numbers([[t // 2] for t in range(6)], seed=1)
    assert found["forced_mass"] == pytest.approx(1)
    assert found["distance_tokens"] == 0


def test_every_block_chosen_by_hand():
    found = numbers([list(range(t // 2 + 1)) for t in range(6)])
    assert found["forced_mass"] == pytest.approx((1 / 1 + 2 / 2 + 1 / 3 + 2 / 4 + 1 / 5 + 2 / 6) / 6)
    assert found["distance_tokens"] == pytest.approx((2 + 2 + (4 + 2) + (4 + 2)) / 6)
    assert found["neighbour_overlap"] == 1


def test_the_forced_first_block_is_not_free():
    spec = NSASpec(1, 1, slc_block=2, slc_count=3, slc_init=1, slc_local=1, window=1)
    found = numbers([[0], [0], [0, 1], [0, 1], [0, 1, 2], [0, 1, 2]], spec)
    assert found["forced_mass"] == pytest.approx((1 + 1 + 1 + 1 + 3 / 5 + 4 / 6) / 6)
    assert found["distance_tokens"] == pytest.approx(2)


def test_overlap_counts_the_blocks_that_the_next_query_reads_too():
    found = numbers([[0], [0], [1], [0, 1], [2], [0, 1, 2]])
    assert found["neighbour_overlap"] == pytest.approx((1 + 0 + 1 + 0 + 1) / (1 + 1 + 1 + 2 + 1))


def test_a_single_token_has_statistics():
    assert numbers([[0]]) == {"forced_mass": 1.0, "distance_tokens": 0.0, "neighbour_overlap": 0.0}


# Against a search in plain Python -------------------------------------------------------------------------------------

WIDE = NSASpec(2, 2, slc_block=4, slc_count=5, slc_init=1, slc_local=2, window=1)
LENGTH, FIRST, HQ, HK, D = 61, 24, 6, 2, 8


def case(seed=0, spec=WIDE):
    """q, k of one document whose attention is far from even, and blocks chosen at random."""
    draw = torch.Generator().manual_seed(seed)
    q, k = (3 * torch.randn(LENGTH, heads, D, generator=draw) for heads in (HQ, HK))
    return q, k, fixed_blocks(torch.arange(LENGTH), HK, spec, torch.tensor(0))


def sets(blocks):
    """[t][head] -> set of chosen blocks."""
    return [[{j for j in head if j >= 0} for head in query] for query in blocks.tolist()]


def test_blocks_of_neighbours_are_counted_as_sets():
    blocks = case()[2]
    of = sets(blocks)
    for together in (1, 2, 4, 8, 61, 62):
        want = [
            [len(set.union(*(of[t][h] for t in range(a, a + together)))) for h in range(HK)]
            for a in range(0, LENGTH - together + 1, together)
        ]
        assert statistics.distinct_blocks(blocks, together).tolist() == want, together
    want = [[len(of[t][h] & of[t + 1][h]) for h in range(HK)] for t in range(LENGTH - 1)]
    assert statistics.read_by_next(blocks).tolist() == want


def test_distances_are_those_of_free_blocks():
    blocks = case()[2]
    found = statistics.free_distances(blocks, FIRST, WIDE)
    assert found.shape == (LENGTH - FIRST, HK, WIDE.slc_count)
    for t in range(FIRST, LENGTH):
        own = t // WIDE.slc_block
        for h in range(HK):
            want = [own - j if 0 < j < own - 1 else 0 for j in blocks[t, h].tolist()]
            assert found[t - FIRST, h].tolist() == want


@pytest.mark.parametrize("multiple", [1, 8])
def test_full_attention_in_chunks_is_that_of_the_whole(multiple, monkeypatch):
    q, k, _ = case()
    monkeypatch.setattr(statistics, "CHUNK_BYTES", 4 * HQ * LENGTH * 11)
    _, want = attend(q, k, k, torch.ones(LENGTH, LENGTH).tril().bool(), D**-0.5)
    chunks = list(statistics.full_attention(q, k, 16, multiple))
    assert [a for a, _ in chunks] == list(range(16, LENGTH, 11 if multiple == 1 else 8))
    for a, p in chunks:
        assert p.shape[-1] == a + p.shape[-2]
        torch.testing.assert_close(p, want[:, :, a : a + p.shape[-2], : p.shape[-1]])


def held_by_search(q, k, blocks, first, spec):
    """[selected, best, random, forced] of each KV head, in numpy; random: the mean over all draws."""
    q, k, of = q.double().numpy(), k.double().numpy(), sets(blocks)
    G, total = q.shape[1] // k.shape[1], np.zeros((4, k.shape[1]))
    for t in range(first, len(q)):
        own = t // spec.slc_block
        for h in range(k.shape[1]):
            scores = q[t, h * G : (h + 1) * G] @ k[: t + 1, h].T * q.shape[-1] ** -0.5
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p = (p / p.sum(-1, keepdims=True)).mean(0)
            mass = [p[j * spec.slc_block : (j + 1) * spec.slc_block].sum() for j in range(own + 1)]
            forced = {j for j in range(own + 1) if j < spec.slc_init or j > own - spec.slc_local}
            free = sorted(set(range(own + 1)) - forced)
            draws = list(combinations(free, min(len(free), spec.slc_count - len(forced))))
            total[:, h] += (
                sum(mass[j] for j in of[t][h]), sum(sorted(mass)[-spec.slc_count :]),
                sum(mass[j] for j in forced) + np.mean([sum(mass[j] for j in draw) for draw in draws]),
                sum(mass[j] for j in forced),
            )  # fmt: skip
    return total


@pytest.mark.parametrize("first", [0, FIRST])
@pytest.mark.parametrize("spec", [WIDE, NSASpec(2, 2, slc_block=8, slc_count=3, slc_init=0, slc_local=1, window=1)])
def test_the_attention_that_blocks_hold_is_that_of_a_search(first, spec, monkeypatch):
    q, k, blocks = case(spec=spec)
    monkeypatch.setattr(statistics, "CHUNK_BYTES", 4 * HQ * LENGTH * 7)
    found = statistics.attention_held(q, k, blocks, first, spec)
    np.testing.assert_allclose(torch.stack(found).numpy(), held_by_search(q, k, blocks, first, spec), rtol=1e-5)
    assert (found.best > found.selected).all()
    assert (found.selected > found.forced).all()
    assert (found.random > found.forced).all()


def test_no_blocks_hold_more_than_the_best():
    q, k, _ = case()
    (chunk,) = statistics.full_attention(q, k)
    mass = torch.nn.functional.pad(chunk[1].mean(1), (0, -LENGTH % 4)).unflatten(-1, (-1, 4)).sum(-1)
    blocks = mass.topk(WIDE.slc_count).indices.transpose(0, 1).int()
    found = statistics.attention_held(q, k, blocks, FIRST, WIDE)
    torch.testing.assert_close(found.selected, found.best)
