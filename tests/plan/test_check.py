"""A run on a GPU of a known kind says once what was planned beside what is measured."""

import re

import pytest

from nsa_train import runtime
from nsa_train.config.load import load_config
from nsa_train.data.stages import stages_of
from nsa_train.plan.check import STARTING, STEPS, PlanCheck
from nsa_train.plan.memory import memory
from nsa_train.plan.speed import step_seconds

H100 = "NVIDIA H100 80GB HBM3"


def lines(device_name, *options, steps=3 * STEPS):
    config = load_config(["experiment=r1", *options])
    check = PlanCheck(config, stages_of(config)[0], 1, device_name)
    return [
        line
        for number in range(steps)
        if (line := check.note(100 + number + 1, 60.0 if number < STARTING else 1.0 + 9 * (number == STARTING)))
    ]


@pytest.fixture(autouse=True)
def _peak(monkeypatch):
    monkeypatch.setattr(runtime, "peak_memory_gib", lambda: 18.66)


def test_it_is_said_once_and_slow_steps_at_the_start_do_not_count():
    (line,) = lines(H100)
    config = load_config(["experiment=r1"])
    tokens = config.trainer.batch_rows * config.trainer.seq_len
    speed, gib = tokens / sum(step_seconds(config, "h100", 1).values()), memory(config, 1).total / 2**30
    assert line == f"step 120: {tokens:,} tok/s, planned {speed:,.0f}; peak 18.7 GiB, planned {gib:.1f}"


@pytest.mark.parametrize(("name", "steps"), [("CPU", 60), ("NVIDIA H100 PCIe", 60), (H100, STEPS - 1)])
def test_nothing_is_said_of_unknown_gpus_or_before_enough_steps(name, steps):
    assert lines(name, steps=steps) == []


def test_without_shares_for_its_numbers_a_run_compares_memory_only():
    (line,) = lines(H100, "trainer.dtype=fp32", "trainer.batch_rows=32")
    assert re.fullmatch(r"step 120: 262,144 tok/s; peak 18.7 GiB, planned \d+\.\d", line)
