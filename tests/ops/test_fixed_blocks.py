"""Blocks that no score chooses: a function of draw, position and head, and every set as likely as another."""

from collections import Counter
from itertools import combinations

import pytest
import torch

from nsa_train.ops.fixed_blocks import fixed_blocks
from nsa_train.ops.nsa import NSASpec
from nsa_train.ops.reference import select_blocks

SPEC = NSASpec(cmp_block=4, cmp_stride=2, slc_block=4, slc_count=6, slc_init=1, slc_local=2, window=5)
LENGTH, HK = 133, 3
POSITIONS = torch.arange(LENGTH)


def blocks_of(draw, positions=POSITIONS, spec=SPEC, Hk=HK):
    return fixed_blocks(positions, Hk, spec, torch.tensor(draw))


@pytest.mark.parametrize(("count", "first", "last"), [(6, 1, 2), (6, 0, 1), (3, 1, 2), (4, 3, 1), (40, 1, 2)])
def test_queries_read_the_forced_blocks_and_as_many_as_selection_gives_them(count, first, last):
    spec = NSASpec(cmp_block=4, cmp_stride=2, slc_block=4, slc_count=count, slc_init=first, slc_local=last)
    scores = torch.rand(LENGTH, HK, -(-LENGTH // 4), generator=torch.Generator().manual_seed(0))
    chosen, found = select_blocks(scores, spec), blocks_of(5, spec=spec)
    alone = fixed_blocks(POSITIONS, HK, spec)
    forced = select_blocks(scores, NSASpec(4, 2, 4, first + last, first, last))
    assert found.shape == alone.shape == chosen.shape
    assert found.dtype == alone.dtype == torch.int32
    assert torch.equal(found >= 0, chosen >= 0)
    assert torch.equal(alone[..., : first + last], forced)
    assert (alone[..., first + last :] == -1).all()
    for t in range(LENGTH):
        for row, must in zip(found[t].tolist(), forced[t].tolist(), strict=True):
            real = [j for j in row if j >= 0]
            assert real == sorted(set(real))
            assert {j for j in must if j >= 0} <= set(real) <= set(range(t // 4 + 1))


def test_every_set_of_free_blocks_is_as_likely():
    """Seven free blocks for three places, over draws, positions and heads each by themselves."""
    draws, heads, block = 700, 8, torch.arange(36, 40)  # block 9
    found = torch.stack([blocks_of(draw, block, Hk=heads) for draw in range(draws)])
    assert found.shape == (draws, 4, heads, 6)
    assert (found[..., 0] == 0).all()
    assert (found[..., 4:] == torch.tensor([8, 9])).all()
    sets = list(combinations(range(1, 8), 3))
    for part in (found, found[:, 0], found[:, 3, 7:]):
        free = [tuple(row) for row in part[..., 1:4].flatten(0, -2).tolist()]
        counts, want = Counter(free), len(free) / len(sets)
        chi_squared = sum((counts[one] - want) ** 2 / want for one in sets)
        assert chi_squared < 70  # 34 degrees of freedom: by chance it is more 3 times in 10,000
        assert set(counts) == set(sets)


def test_another_draw_reads_other_blocks_and_the_same_draw_the_same():
    """Of 3 free blocks of some 20 two draws have 3 * 3 / 20 in common, by chance."""
    one, again, *others = (blocks_of(draw)[80:] for draw in (3, 3, 4, 2**32 - 1, 3 + 2**31))
    assert torch.equal(one, again)
    for other in others:
        same = (one[..., None] == other[..., None, :]).any(-1).sum(-1).float() - 3
        assert 0.3 < float(same.mean()) < 0.6


def test_blocks_of_packed_documents_are_those_of_each_alone():
    lengths = (19, 1, 64, 133, 8)
    packed = blocks_of(7, torch.cat([torch.arange(n) for n in lengths]))
    assert torch.equal(packed, torch.cat([blocks_of(7, torch.arange(n)) for n in lengths]))
    assert torch.equal(packed[-8:], blocks_of(7)[:8])


def test_a_compiled_layer_takes_them_as_they_are():
    """Compiling them takes minutes."""

    def compiler(graph, inputs):
        raise AssertionError("something was compiled")

    compiled = torch.compile(lambda draw: fixed_blocks(POSITIONS, HK, SPEC, draw), backend=compiler)
    assert torch.equal(compiled(torch.tensor(3)), blocks_of(3))
