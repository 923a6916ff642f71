"""A run that is killed twice and goes on with other numbers of processes reads what an undisturbed run reads."""

import shutil

import numpy as np
import pytest
from reading import run

from nsa_train.bench.data import realistic_lengths

STEPS = 17


def global_batches(folder):
    """Digests of the rows of each step, whichever rank read them."""
    steps = [[] for _ in range(STEPS)]
    for file in folder.glob("rank*.txt"):
        for line in file.read_text().splitlines():
            step, *digests = line.split()
            steps[int(step)] += digests
    return [sorted(digests) for digests in steps]


@pytest.mark.process
def test_killed_and_resumed_twice_with_other_processes_it_reads_the_batches_of_an_undisturbed_run(tmp_path):
    lengths = np.minimum(realistic_lengths(60), 6000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    np.save(whole / "tokens.npy", np.random.default_rng(0).integers(0, 999, offsets[-1], np.uint16))
    np.save(whole / "offsets.npy", offsets)
    np.save(whole / "sources.npy", np.arange(60, dtype=np.int32) % 2)
    shutil.copytree(whole, broken)

    assert run(whole, 1, STEPS) == [0]
    assert run(broken, 2, 6, die=True) == [-9, -9]  # saved at 4
    assert run(broken, 3, 15, die=True) == [-9, -9, -9]  # saved at 12, behind the change of stage at 9
    assert run(broken, 6, STEPS) == [0] * 6
    undisturbed = global_batches(whole)
    assert [len(digests) for digests in undisturbed] == [12] * 9 + [6] * 8
    assert len({digest for digests in undisturbed for digest in digests}) > 120
    assert global_batches(broken) == undisturbed
