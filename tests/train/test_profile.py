"""A profile says where the time of a step goes, and changes nothing."""

import gzip
import json
import subprocess
import sys

import launch
import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from nsa_train.train.profile import DATA, OTHER, PARTS, with_parts


def test_backward_counts_for_the_part_of_its_forward_also_when_that_is_recomputed():
    weight = torch.randn(8, 8, requires_grad=True)

    def product(x):
        with record_function("experts"):
            return torch.tanh(x @ weight)

    with profile(activities=[ProfilerActivity.CPU]) as found:
        x = torch.utils.checkpoint.checkpoint(product, torch.randn(8, 8), use_reentrant=False)
        with record_function("norms"):
            x = x * 2
        x.sum().backward()
    parts = [(event.name, part) for event, part in with_parts(found.events())]
    assert [part for name, part in parts if name == "aten::mm"] == ["experts"] * 3  # forward, again, backward
    assert [part for name, part in parts if name == "aten::mul"] == ["norms"] * 2
    assert {part for name, part in parts if name == "aten::sum"} == {OTHER}


@pytest.mark.process
def test_a_profiled_run_writes_trace_and_table_and_has_the_losses_of_another(train, whole, tmp_path):
    job = train("profile=trace", "profile.skip=1", "profile.steps=2", "name=profiled")
    assert job.wait() == 0, job.text
    folder = tmp_path / "profiled" / "profile"
    report = json.loads((folder / "parts.json").read_text())
    assert report["steps"] == 2
    assert set(PARTS) | {DATA} <= report["parts"].keys()
    assert 0 < sum(report["parts"].values()) < 1.1 * report["step_ms"]
    assert "a step of" in job.text
    assert "attention" in job.text
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    assert {"attention", "optimizer"} <= {event.get("name") for event in events}
    assert [row["loss"] for row in launch.rows(tmp_path / "profiled")] == [row["loss"] for row in launch.rows(whole)]


@pytest.mark.process
def test_a_run_that_is_stopped_while_it_is_profiled_ends_as_any_other(corpus, tmp_path):
    words = [*launch.SMALL, *corpus, "profile=trace", "profile.skip=1", "profile.steps=100", "trainer.steps=200"]
    command = [sys.executable, "-m", "nsa_train", "train", *words, f"runs_dir={tmp_path}", "name=run"]
    with (tmp_path / "output").open("w") as output:
        job = subprocess.Popen(command, stdout=output, stderr=output)
    launch.wait_until(lambda: launch.has_step(tmp_path / "run", 4) or job.poll() is not None)
    job.terminate()
    assert job.wait(launch.PATIENCE_S) == 75, (tmp_path / "output").read_text()
    assert not (tmp_path / "run" / "profile").exists()
