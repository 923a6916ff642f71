"""A profile says where the time of a step goes, and changes nothing."""

import ast
import gzip
import json
import subprocess
import sys
import threading
from pathlib import Path

import launch
import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from nsa_train import ops
from nsa_train.config.load import load_config
from nsa_train.model.transformer import Transformer
from nsa_train.packing import Packing
from nsa_train.train.profile import DATA, KERNELS, OTHER, PARTS, time_by_part, with_parts

OF_FILE = {  # of ops, by the first word of its name
    "compressed": "attention, cmp", "select": "attention, selection", "selected": "attention, slc",
    "window": "attention, win", "combine": "attention, gates",
}  # fmt: skip


def launched_kernels(path):
    """Names of the jit functions of a file that it launches, `kernel[grid](...)`: those that a profile shows."""
    tree = ast.parse(path.read_text())
    compiled = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(one).endswith(".jit") for one in node.decorator_list)
    }
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return compiled & {ast.unparse(call.value) for call in calls if isinstance(call, ast.Subscript)}


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


def test_operations_of_another_thread_have_numbers_of_their_own():
    weights = torch.randn(2, 8, requires_grad=True)
    found = {}

    def elsewhere():
        with record_function("head"):
            found["head"] = weights[0].sin().sum()

    every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=every_thread) as seen:
        with record_function("experts"):
            found["experts"] = weights[1].cos().sum()
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        (found["experts"] + found["head"]).backward()
    parts = {event.name: part for event, part in with_parts(seen.events())}
    assert (parts["SinBackward0"], parts["CosBackward0"]) == ("head", "experts")


def test_every_kernel_counts_for_the_branch_in_whose_file_it_stands():
    found = {(path.stem, kernel) for path in Path(ops.__path__[0]).glob("*.py") for kernel in launched_kernels(path)}
    for stem, kernel in found:
        parts = [part for start, part in KERNELS.items() if kernel.startswith(start)]
        wanted = OF_FILE.get(stem.split("_")[0])
        assert parts == ([wanted] if wanted else []), (stem, kernel)
    unused = [start for start in KERNELS if not any(kernel.startswith(start) for _, kernel in found)]
    assert unused == ["nccl"]


@pytest.mark.parametrize(("arm", "part"), [("full", "attention, full"), ("window", "attention, win")])
def test_dense_attention_is_a_part_of_its_own_forward_and_backward(arm, part):
    config = load_config([*launch.SMALL, f"attention={arm}"])
    model, packing = Transformer(config.model, config.attention, config.moe), Packing.from_lengths([60, 36])
    model.start(0)
    tokens = torch.arange(96)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        model(tokens, tokens, packing, 96).token_losses.sum().backward()
    parts = [(event.name, of) for event, of in with_parts(found.events())]
    passes = {name.endswith("_backward"): of for name, of in parts if "scaled_dot_product" in name}
    assert passes == {False: part, True: part}
    assert [of for name, of in parts if name == "aten::mm"].count("attention") == 3 * 3 * config.model.layers
    assert {"attention", part} < time_by_part(found.events(), on_gpu=False).keys()


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
