"""A run of two GPUs goes on on one, and the other way: the rows are the same, the losses but for rounding."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
STEPS, STOP = 12, 6
TOLERANCE = 2e-3  # relative, of bf16 and sums in another order over six steps; lost moments or other rows make 1e-2
RUN = [
    "-m", "nsa_train", "train", "experiment=tiny", "attention=nsa", "trainer.dtype=bf16", "model.layers=2",
    f"trainer.steps={STEPS}", f"trainer.checkpoint_every={STOP}", "trainer.log_every=1", "trainer.val_every=100",
    "trainer.val_rows=8", "trainer.export=false", "logging.wandb=disabled", "name=run",
]  # fmt: skip


def trained(folder, corpus, processes, layout):
    """Train in `folder`, or go on there; what the run said."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    words = [f"runs_dir={folder}", f"data.prepared_dir={corpus}", *layout]
    done = subprocess.run([sys.executable, *launcher, *RUN, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(run):
    """By split and step."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {(row["split"], row["step"]): row["loss"] for row in rows}


def rows_read(run):
    """What names the rows of the run, and how far it has read them."""
    manifest = json.loads((run / "checkpoints" / f"step_{STEPS}" / "manifest.json").read_text())
    return json.loads((run / "manifest.json").read_text())["rows_fingerprint"], manifest["state"]["loader"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tmp_path_factory.mktemp("corpus")


@pytest.mark.parametrize(
    ("before", "after", "layout"),
    [(2, 1, []), (2, 1, ["parallel=zero3"]), (1, 2, [])],
    ids=["2 to 1", "2 to 1, ZeRO 3", "1 to 2"],
)
def test_a_run_goes_on_with_another_number_of_gpus(before, after, layout, corpus, tmp_path):
    whole, resumed = tmp_path / "whole" / "run", tmp_path / "resumed" / "run"
    trained(whole.parent, corpus, before, layout)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / f"step_{STEPS}")
    (resumed / "summary.json").unlink()  # it says that the run is finished
    said = trained(resumed.parent, corpus, after, layout)
    assert f"at step {STOP}\n" in said
    assert json.loads((resumed / "manifest.json").read_text())["world_size"] == after
    assert rows_read(resumed) == rows_read(whole)
    want, got = losses(whole), losses(resumed)
    assert got.keys() == want.keys()
    apart = {at: abs(got[at] / want[at] - 1) for at in want}
    print(*(f"{at}: {want[at]:.5f}, resumed {got[at]:.5f}, {apart[at]:.1e} apart" for at in want), sep="\n")
    assert all(got[at] == want[at] for at in want if at[1] <= STOP)  # lines that the resumed run took over
    assert max(apart.values()) < TOLERANCE
