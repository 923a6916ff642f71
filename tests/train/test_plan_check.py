"""A training run says once how it compares with its plan, where the kind of its GPU is known."""

import re
from dataclasses import replace
from functools import partial

import launch
import pytest

from nsa_train.plan.check import STEPS
from nsa_train.plan.speed import GPUS

pytestmark = pytest.mark.process
LONG = ["trainer.dtype=bf16", f"trainer.steps={2 * STEPS + 2}", "trainer.val_every=100", "trainer.checkpoint_every=25"]
LINE = r"^step +(\d+): [\d,]+ tok/s, planned [\d,]+; peak \d+\.\d GiB, planned \d+\.\d$"


def test_it_is_said_once_a_launch_and_leaves_the_metrics_alone(train, tmp_path):
    name = partial(launch.name_device, GPUS["h100"].name)
    first = train(*LONG, before=name)
    assert first.wait() == 0, first.text
    assert re.findall(LINE, first.text, re.MULTILINE) == [str(STEPS)]
    assert not any("seconds" in row for row in launch.rows(tmp_path / "run"))


def on_small_gpus(gib):
    launch.name_device(GPUS["h100"].name)
    GPUS["h100"] = replace(GPUS["h100"], memory_gib=gib)


def test_gpus_that_may_be_too_small_are_told_of_by_one_rank_and_the_run_goes_on(train_ranks, tmp_path):
    """Of 2 GiB CUDA leaves nothing."""
    jobs = train_ranks(2, "trainer.steps=2", "trainer.checkpoint_every=0", before=partial(on_small_gpus, 2.0))
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].text
    warnings = [re.findall("^warning: memory may run out.*weights.*too small by", job.text, re.M) for job in jobs]
    assert [len(found) for found in warnings] == [1, 0]


def test_gpus_that_cannot_hold_the_states_are_refused_on_all_ranks_before_data_is_prepared(train_ranks, tmp_path):
    prepared = tmp_path / "prepared"
    jobs = train_ranks(2, f"data.prepared_dir={prepared}", before=partial(on_small_gpus, 1e-6))
    assert [job.wait() for job in jobs] == [2, 2]
    assert [job.text.count("weights, gradients and optimizer take") for job in jobs] == [1, 0]
    assert "Traceback" not in "".join(job.text for job in jobs)
    assert launch.summary(tmp_path / "run")["exit_code"] == 2
    assert not prepared.exists()
