"""Time what `make train` does on this machine, for NSA and for full attention, into docs/results/first_run_*.json.

python scripts/first_run.py cpu            # one process
python scripts/first_run.py h100 --processes 1
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from nsa_train import runtime
from nsa_train.bench import results
from nsa_train.bench.runs import train_run
from nsa_train.config.load import load_config
from nsa_train.config.rules import SAFE_NAME
from nsa_train.errors import NsaTrainError

ARMS = ("nsa", "full")
SUMMARY = ("steps", "tokens", "val_loss_first", "val_loss_last", "unigram_entropy", "params_total", "params_active",
           "corpus_hash", "wall_s")  # fmt: skip


def one_run(arm: str, processes: int, runs: Path, overrides: list[str]) -> dict[str, Any]:
    """Train the default experiment with one arm; a row, with `error` in place of figures where it failed."""
    run = train_run(runs / f"tiny-{arm}", [f"attention={arm}", f"runs_dir={runs}", *overrides], processes, show=True)
    row: dict[str, Any] = {"attention": arm, "processes": processes, "command_s": run.command_s}
    if run.error:
        return {**row, "error": run.error}
    speeds = [r["tokens_per_s"] for r in run.logged[1:]]  # the first holds start-up
    return {
        **row, **{key: run.summary[key] for key in SUMMARY}, "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_min": min(speeds), "tokens_per_s_max": max(speeds),
        "peak_gib": max(r["mem_gib"] for r in run.logged),
    }  # fmt: skip


def check(machine: str, processes: int, overrides: list[str]) -> None:
    """Raises NsaTrainError for what the runs would stumble over, before a result of theirs replaces an earlier one."""
    if not SAFE_NAME.fullmatch(machine):
        raise NsaTrainError(f"machine {machine!r} may hold letters, digits and . _ - only, 100 at most")
    if processes < 1:
        raise NsaTrainError(f"--processes {processes} must be 1 or more")
    for arm in ARMS:
        load_config([f"attention={arm}", *overrides], processes, runtime.on_gpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", help="name of this kind of machine, such as cpu or h100")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--commit", help="source commit, where the tree is no git checkout")
    parser.add_argument("overrides", nargs="*", help="key=value for all runs")
    args = parser.parse_intermixed_args()
    try:
        check(args.machine, args.processes, args.overrides)
    except NsaTrainError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    runtime.share_cores(args.processes)
    with tempfile.TemporaryDirectory() as folder:
        rows = [one_run(arm, args.processes, Path(folder), args.overrides) for arm in ARMS]
    print(results.write_result(f"first_run_{args.machine}", "first_run", rows, args.commit))


if __name__ == "__main__":
    main()
