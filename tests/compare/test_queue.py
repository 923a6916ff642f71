"""The script that trains the arms of a comparison picks learning rates from runs that are there."""

import json
import subprocess
import sys
from pathlib import Path

from folders import make_run

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "compare_arms.py"


def start(*words):
    return subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, check=False)


SWEEP = ["trainer.steps=6", "data.prepared_dir=none"]


def swept(tmp_path, losses):
    """Finished runs of a sweep, found and not repeated; None: it diverged."""
    for (arm, lr), loss in losses.items():
        ending = {"val_loss_last": loss} if loss else {"status": "failed", "exit_code": 18}
        run = make_run(tmp_path, arm, overrides=[f"name=tiny-{arm}-lr{lr:g}", f"optim.lr={lr}", *SWEEP], summary=ending)
        assert run.name == f"tiny-{arm}-lr{lr:g}"
    lrs = sorted({lr for _, lr in losses})
    return start("sweep", "--arms", *dict.fromkeys(arm for arm, _ in losses), "--lrs", *lrs, "--set", *SWEEP,
                 f"runs_dir={tmp_path}", "seed=0")  # fmt: skip


def test_a_sweep_takes_the_lowest_held_out_loss_and_tells_of_the_edge(tmp_path):
    losses = {("full", 1e-3): 5.0, ("full", 2e-3): 4.9, ("full", 4e-3): 5.1,
              ("nsa", 1e-3): 5.0, ("nsa", 2e-3): 4.9, ("nsa", 4e-3): 4.8}  # fmt: skip
    done = swept(tmp_path, losses)
    said = done.stdout
    assert done.returncode == 0, done.stderr
    assert "full: best learning rate 0.002 of 0.001: 5.0000, 0.002: 4.9000, 0.004: 5.1000\n" in said
    assert "nsa: best learning rate 0.004 of" in said
    assert said.count("at the edge: extend --lrs") == 1
    rows = json.loads((tmp_path / "tiny-lr.json").read_text())["rows"]
    assert [(row["arm"], row["lr"], row["at_edge"]) for row in rows] == [("full", 2e-3, False), ("nsa", 4e-3, True)]


def test_finished_runs_are_asked_and_compared_even_where_they_cannot_answer(tmp_path):
    names = {arm: make_run(tmp_path, arm, overrides=[f"name=tiny-{arm}-seed0", *SWEEP]) for arm in ("full", "nsa")}
    (names["full"] / "eval").mkdir()
    (names["full"] / "eval" / "needle.json").write_text('{"rows": []}')
    done = start("run", "--arms", *names, "--eval", "needle", "--out", tmp_path / "out", "--set", *SWEEP,
                 f"runs_dir={tmp_path}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 of 2 runs are finished" in done.stdout
    assert "tiny-nsa-seed0: exit code 2" in done.stdout
    assert "no export of a finished run" in (names["nsa"] / "console.log").read_text()
    assert (tmp_path / "out" / "comparison_tiny.md").is_file()


def test_tasks_that_do_not_fit_an_arm_are_not_asked_of_it(tmp_path):
    names = {arm: make_run(tmp_path, arm, overrides=[f"name=tiny-{arm}-seed0", *SWEEP])
             for arm in ("full", "window", "nsa_random", "nsa")}  # fmt: skip
    words = ["run", "--arms", *names, "--out", tmp_path / "out", "--set", *SWEEP, f"runs_dir={tmp_path}"]
    done = start(*words, "--eval", "blocks")
    assert done.returncode == 0, done.stderr
    assert "3 of 4 runs are finished" in done.stdout
    assert "tiny-nsa-seed0: eval" in done.stdout
    done = start(*words, "--eval", "maps", "--lengths", "128,256")
    assert "1 of 4 runs are finished" in done.stdout
    assert "no export of a finished run" in (names["nsa_random"] / "console.log").read_text()


def test_a_task_that_there_is_not_is_told_before_training(tmp_path):
    done = start("run", "--arms", "full", "nsa", "--eval", "needles", "--set", f"runs_dir={tmp_path}")
    assert done.returncode == 2
    assert "invalid choice: 'needles'" in done.stderr


def test_rates_of_a_sweep_must_name_the_arm(tmp_path):
    (tmp_path / "lr.json").write_text(json.dumps({"rows": [{"arm": "full", "lr": 0.002}]}))
    words = ["run", "--arms", "full", "nsa", "--rates", tmp_path / "lr.json", "--set", f"runs_dir={tmp_path}"]
    done = start(*words)
    assert done.returncode == 2
    assert "no learning rate for nsa; sweep these arms too" in done.stderr
