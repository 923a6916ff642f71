"""A training run as a process of its own, and what it left behind: what benchmarks of whole runs are made of."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from nsa_train import runtime
from nsa_train.bench import results
from nsa_train.errors import NsaTrainError
from nsa_train.train.metrics import METRICS, read_metrics

MEASURED_ONLY = (  # what a run leaves out that nobody goes on with
    "trainer.checkpoint_every=0", "trainer.val_rows=1", "trainer.heldout_rows=null", "trainer.export=false",
    "logging.wandb=disabled",
)  # fmt: skip
RECOMPUTED = "trainer.activation_checkpointing=true"


def parts_recomputed(row: dict[str, Any]) -> list[str]:
    """Of a layer, in the run behind a row of a benchmark; rows of before there was a choice do not name them."""
    return row.get("recomputed", ["attention", "mlp"]) if row["checkpointing"] else []


def key_of(row: dict[str, Any], keys: Sequence[str]) -> tuple[Any, ...]:
    """What tells the runs behind rows apart: these keys, what is recomputed, and overrides but for where data lie."""
    overrides = sorted(word for word in row["overrides"] if not word.startswith(("data.corpus=", "data.root=")))
    return (*(row.get(key) for key in keys), *parts_recomputed(row), *overrides)


@dataclass(frozen=True)
class Run:
    """command_s  seconds of the whole command; error  why it failed, or None; then `logged` and `summary` are empty

    logged   rows of metrics.jsonl about training
    summary  summary.json
    output   what it printed, unless that went to the console
    """

    command_s: float
    error: str | None
    logged: list[dict[str, Any]]
    summary: dict[str, Any]
    output: str = ""

    @property
    def dense_kernels(self) -> list[str]:
        """Backends of `ops.dense` that it named as it first used them."""
        return sorted(set(re.findall(r"dense attention .* runs on (\w+)", self.output)))


def last_words(stderr: str) -> str:
    """What a run said before torchrun, if that launched it, reported its end."""
    lines = stderr.strip().splitlines()
    own = [*takewhile(lambda line: "torch/distributed/elastic" not in line, lines)]
    return "\n".join(own or lines)[-300:]


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
        said = "" if show else f": {last_words(done.stderr)}"
        return Run(seconds, f"exit code {done.returncode}{said}", [], {})
    logged = [row for row in read_metrics(folder / METRICS) if row["split"] == "train"]
    output = "" if show else done.stdout + done.stderr
    return Run(seconds, None, logged, json.loads((folder / "summary.json").read_text()), output)


def parse_on_gpus(parser: argparse.ArgumentParser, arguments: list[str], measures: str) -> argparse.Namespace:
    """With the options that benchmarks of runs on GPUs share. Raises NsaTrainError where there is no GPU."""
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of the JSON")
    parser.add_argument("--commit", help="source commit, where the tree is no git checkout")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="for all runs")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        bench = parser.prog.removeprefix("nsa-train ")
        raise NsaTrainError(f"{bench}: no CUDA device here; it measures {measures}")
    runtime.share_cores(args.gpus)
    return args
