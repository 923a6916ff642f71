"""A run that is killed twice and goes on with other numbers of processes reads what an undisturbed run reads."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nsa_train.bench.data import realistic_lengths

PROGRAM = Path(__file__).with_name("read_batches.py")
STEPS = 17


def run(folder, world, until, *words):
    if (folder / "state.json").exists():
        shutil.copy(folder / "state.json", folder / "start.json")
    ranks = [
        subprocess.Popen([sys.executable, PROGRAM, folder, str(rank), str(world), str(until), *words])
        for rank in range(world)
    ]
    return [process.wait() for process in ranks]


def global_batches(folder, worlds):
    """Digests of the rows of each step, the last that were written, whichever rank read them."""
    steps = {}
    for world in worlds:  # in the order of the runs: what was read again after a kill replaces what was read before
        lines = [line.split() for file in folder.glob(f"rank*of{world}.txt") for line in file.read_text().splitlines()]
        for step in {int(line[0]) for line in lines}:
            steps[step] = sorted(digest for line in lines if int(line[0]) == step for digest in line[1:])
    return steps


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
    assert run(broken, 2, 6, "--die") == [-9, -9]  # saved at 4
    assert run(broken, 3, 15, "--die") == [-9, -9, -9]  # saved at 12, behind the change of stage at 9
    assert run(broken, 1, STEPS) == [0]
    undisturbed, resumed = global_batches(whole, [1]), global_batches(broken, [2, 3, 1])
    assert [len(undisturbed[step]) for step in range(STEPS)] == [12] * 9 + [6] * 8
    assert len({digest for digests in undisturbed.values() for digest in digests}) > 120
    assert resumed == undisturbed
