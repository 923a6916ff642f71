"""A run on a GPU of a known kind says where its plan needs more memory, and once what was planned beside measured."""

import re
from dataclasses import replace

import pytest

from nsa_train import runtime
from nsa_train.config.load import load_config
from nsa_train.data.stages import stages_of
from nsa_train.errors import ConfigError
from nsa_train.plan.advice import CONTEXT_GIB, GIB, need, verdict
from nsa_train.plan.check import STARTING, STEPS, PlanCheck, check_memory
from nsa_train.plan.memory import memory
from nsa_train.plan.speed import GPUS, step_seconds

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


# Before it starts -----------------------------------------------------------------------------------------------------


@pytest.fixture
def said(monkeypatch, caplog):
    """Of a run on an H100 that has so much memory."""

    def of(gib, *options, ranks=1, name=H100):
        monkeypatch.setitem(GPUS, "h100", replace(GPUS["h100"], memory_gib=gib))
        caplog.clear()
        check_memory(load_config(["experiment=r1", *options]), ranks, name)
        return [record.getMessage() for record in caplog.records]

    return of


def states_gib(config, ranks=1):
    found = need(config, ranks).states
    return (found["weights"] + found["gradients"] + found["optimizer"]) / GIB


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_need_above_the_room_is_told_by_part_with_what_would_fit(said, ranks):
    config = load_config(["experiment=r1"])
    found = need(config, ranks)
    enough = found.total / GIB + CONTEXT_GIB
    assert said(enough + 0.01, ranks=ranks) == []
    (line,) = said(enough - 0.01, ranks=ranks)
    assert f"`nsa-train plan gpu=h100 gpus={ranks}`" in line
    assert line.endswith(verdict(config, "h100", ranks))
    assert "fits, with" in line
    told = {
        part: float(size) for part, size in re.findall(r"([a-z][A-Za-z ]+) (\d+\.\d)(?=, )", line.partition(": ")[2])
    }
    for part in ("weights", "gradients", "optimizer", "attention", "head"):
        assert told[part] == pytest.approx({**found.states, **found.kept}[part] / GIB, abs=0.051)
    assert f"all {found.total / GIB:.1f}" in line


def test_only_states_beyond_the_whole_gpu_are_refused(said):
    gib = states_gib(load_config(["experiment=r1"]))
    assert len(said(gib + 0.01)) == 1
    with pytest.raises(ConfigError, match=rf"take {gib:.1f} GiB of each GPU.* too small by .*"):
        said(gib - 0.01)
    assert len(said(gib - 0.01, "parallel.offload_optimizer=cpu")) == 1
    assert len(said(states_gib(load_config(["experiment=r1"]), 2) + 0.01, ranks=2)) == 1  # buckets do not count


def test_the_stage_with_the_longest_rows_counts(said):
    rows = ["trainer.batch_rows=32", "trainer.steps=9000", "trainer.micro_rows=1"]
    short = need(load_config(["experiment=r1", *rows]), 1).total / GIB + CONTEXT_GIB
    assert said(short + 0.01, *rows) == []
    assert len(said(short + 0.01, *rows, "stages=long_64k")) == 1


@pytest.mark.parametrize("name", ["CPU", "NVIDIA H100 PCIe"])
def test_of_unknown_gpus_nothing_is_said_or_refused(said, name):
    assert said(1e-3, name=name) == []
