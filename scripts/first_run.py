"""Time what `make train` does on this machine, for NSA and for full attention, into docs/results/first_run_*.json.

python scripts/first_run.py cpu            # one process
python scripts/first_run.py h200 --processes 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nsa_train import runtime
from nsa_train.bench import results
from nsa_train.train.metrics import METRICS, read_metrics

ARMS = ("nsa", "full")
SUMMARY = ("steps", "tokens", "val_loss_first", "val_loss_last", "unigram_entropy", "params_total", "params_active",
           "corpus_hash", "wall_s")  # fmt: skip


def one_run(arm: str, processes: int, runs: Path, overrides: list[str]) -> dict[str, Any]:
    """Train the default experiment with one arm; a row, with `error` in place of figures where it failed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launch, "-m", "nsa_train", "train", f"attention={arm}", f"runs_dir={runs}", *overrides]
    started = time.perf_counter()
    done = subprocess.run(command, check=False)
    row: dict[str, Any] = {"attention": arm, "processes": processes, "command_s": time.perf_counter() - started}
    if done.returncode:
        return {**row, "error": f"exit code {done.returncode}"}
    folder = runs / f"tiny-{arm}"
    summary = json.loads((folder / "summary.json").read_text())
    steps = [r for r in read_metrics(folder / METRICS) if r["split"] == "train"]
    speeds = [r["tokens_per_s"] for r in steps[1:]]  # the first holds start-up
    return {
        **row, **{key: summary[key] for key in SUMMARY}, "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_min": min(speeds), "tokens_per_s_max": max(speeds),
        "peak_gib": max(r["mem_gib"] for r in steps),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", help="name of this kind of machine, such as cpu or h200")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--commit", help="source commit, where the tree is no git checkout")
    parser.add_argument("overrides", nargs="*", help="key=value for all runs")
    args = parser.parse_intermixed_args()
    runtime.share_cores(args.processes)
    with tempfile.TemporaryDirectory() as folder:
        rows = [one_run(arm, args.processes, Path(folder), args.overrides) for arm in ARMS]
    print(results.write_result(f"first_run_{args.machine}", "first_run", rows, args.commit))


if __name__ == "__main__":
    main()
