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


def test_rates_of_a_sweep_must_name_the_arm(tmp_path):
    (tmp_path / "lr.json").write_text(json.dumps({"rows": [{"arm": "full", "lr": 0.002}]}))
    words = ["run", "--arms", "full", "nsa", "--rates", tmp_path / "lr.json", "--set", f"runs_dir={tmp_path}"]
    done = start(*words)
    assert done.returncode == 2
    assert "no learning rate for nsa; sweep these arms too" in done.stderr
