"""A training run as a process of its own, and what it left behind: what benchmarks of whole runs are made of."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_train.train.metrics import METRICS, read_metrics


@dataclass(frozen=True)
class Run:
    """command_s  seconds of the whole command; error  why it failed, or None; then `logged` and `summary` are empty

    logged   rows of metrics.jsonl about training
    summary  summary.json
    """

    command_s: float
    error: str | None
    logged: list[dict[str, Any]]
    summary: dict[str, Any]


def train_run(folder: Path, overrides: list[str], processes: int | None = None, show: bool = False) -> Run:
    """Train with these overrides, which lead to the run folder `folder`.

    processes  launched by torchrun; None: plain `python -m nsa_train train`
    show       its output goes to this console instead of into `error`
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    command = [sys.executable, *torchrun, "-m", "nsa_train", "train", *overrides]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=not show, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        said = "" if show else f": {done.stderr.strip()[-300:]}"
        return Run(seconds, f"exit code {done.returncode}{said}", [], {})
    logged = [row for row in read_metrics(folder / METRICS) if row["split"] == "train"]
    return Run(seconds, None, logged, json.loads((folder / "summary.json").read_text()))
