"""A comparison small enough for a CPU: its script is stopped, gone on with elsewhere, and writes the report."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launch import PATIENCE_S, SMALL, has_step, summary, wait_until

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "compare_arms.py"


def start(words):
    command = [sys.executable, SCRIPT, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process, code):
    text = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == code, text
    return text


@pytest.mark.process
def test_two_arms_with_two_seeds_are_stopped_gone_on_with_and_compared(corpus, tmp_path):
    words = ["run", "--arms", "full", "nsa", "--seeds", 0, 1, "--name", "ci", "--out", tmp_path / "out"]
    words += ["--keep", tmp_path / "kept", "--set", *SMALL, *corpus, f"runs_dir={tmp_path}"]
    runs = {(arm, seed): tmp_path / f"tiny-{arm}-seed{seed}" for seed in (0, 1) for arm in ("full", "nsa")}
    first = start(words)
    wait_until(lambda: has_step(runs["nsa", 0], 1))
    first.send_signal(signal.SIGTERM)
    assert "the same command goes on" in ended(first, 75)
    assert summary(runs["full", 0])["status"] == "done"
    assert summary(runs["nsa", 0])["status"] == "interrupted"
    assert not runs["full", 1].exists() or not (runs["full", 1] / "summary.json").exists()
    (file,) = (tmp_path / "kept").iterdir()
    before = file.read_bytes()
    shutil.rmtree(runs["full", 0])
    said = ended(start(words), 0)
    assert "1 of 4 runs are finished, 1 at a time" in said
    assert file.read_bytes() == before
    assert not (runs.pop(("full", 0)) / "summary.json").exists()
    assert [summary(run)["status"] for run in runs.values()] == ["done"] * 3
    assert len(list((tmp_path / "kept").iterdir())) == 4
    rows = json.loads((tmp_path / "out" / "comparison_ci.json").read_text())["rows"]
    assert [(row["arm"], row["seed"]) for row in rows if row["what"] == "run"] == [
        ("full", 0), ("full", 1), ("nsa", 0), ("nsa", 1),
    ]  # fmt: skip
    words = ["run", "--arms", "full", "nsa", "--seeds", 1, "--name", "longer", "--start-from", tmp_path]
    words += ["--out", tmp_path / "out", "--set", *SMALL, *corpus, f"runs_dir={tmp_path / 'long'}", "trainer.steps=2"]
    words += ["stages=extend_32k", "stages.parts.long.seq_len=384", "stages.parts.long.rope_factor=3"]
    lost = [str(tmp_path / "lost") if word is tmp_path else word for word in words]
    missing = ", ".join(str(tmp_path / "lost" / f"tiny-{arm}-seed1") for arm in ("full", "nsa"))
    assert f"error: --start-from: there are no runs {missing}; train them first" in ended(start(lost), 2)
    assert f", from weights that runs of {summary(runs['nsa', 1])['steps']} steps had trained." in ended(
        start(words), 0
    )
    assert {f"comparison_ci.{end}" for end in ("json", "md", "png")} == {
        path.name for path in (tmp_path / "out").glob("*_ci.*")
    }
