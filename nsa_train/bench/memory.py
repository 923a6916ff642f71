"""`nsa-train bench memory`: the memory that `nsa-train plan` says a run needs, beside the peak that a GPU allocates.

A few steps of each run, two micro-batches each. `planned_gib` is of a rank, by part: states, activations kept from the
forward to the backward pass, and what comes and goes, of which the largest counts. `ratio` is measured over planned.
Rows that the file has of other runs stay in it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nsa_train import runtime
from nsa_train.bench import results, runs
from nsa_train.bench.figures import plot_bars
from nsa_train.bench.runs import MEASURED_ONLY, RECOMPUTED, parse_on_gpus, parts_recomputed, train_run
from nsa_train.config.load import load_config
from nsa_train.plan.advice import GIB, need
from nsa_train.plan.memory import Memory

Case = tuple[str, str, int, int, tuple[str, ...]]  # preset, arm, T, rows of a forward pass, overrides

STEPS, MICRO_BATCHES = 3, 2
key_of = partial(runs.key_of, keys=("preset", "attention", "T", "micro_rows", "dtype", "checkpointing", "zero", "gpus"))
# ZeRO 1 takes fp32 only: it would sum gradients in bf16.
CASES: tuple[Case, ...] = (
    ("r1", "nsa", 8192, 8, ()),
    ("r1", "full", 8192, 8, ()),
    ("r1", "nsa", 65536, 1, ()),
    ("r1", "nsa", 8192, 2, ("parallel=zero1", "trainer.dtype=fp32")),
    ("r1", "nsa", 8192, 2, ("parallel=zero2", "trainer.dtype=fp32")),
    ("r2", "nsa", 8192, 4, ()),
    ("r2", "nsa", 8192, 4, ("parallel=zero3",)),
    ("r2", "nsa", 8192, 4, (RECOMPUTED,)),
    ("r2", "nsa", 8192, 4, (RECOMPUTED, "trainer.recomputed=[attention]")),
    ("r2", "nsa", 8192, 4, (RECOMPUTED, "trainer.recomputed=[mlp]")),
    ("m", "nsa", 8192, 1, ()),
    ("m", "nsa", 65536, 1, (RECOMPUTED,)),
)


def overrides_of(preset: str, arm: str, T: int, micro_rows: int, gpus: int, rest: Sequence[str]) -> list[str]:
    return [
        f"experiment={preset}", f"attention={arm}", f"trainer.seq_len={T}", f"trainer.micro_rows={micro_rows}",
        f"trainer.batch_rows={micro_rows * MICRO_BATCHES * gpus}", f"trainer.steps={STEPS}", "trainer.log_every=1",
        f"trainer.val_every={STEPS}", *MEASURED_ONLY, *rest,
    ]  # fmt: skip


def one_run(case: Case, gpus: int, rest: list[str], folder: Path) -> dict[str, Any]:
    """A row; with `error` in place of figures where the run failed."""
    preset, arm, T, micro_rows, own = case
    overrides = overrides_of(preset, arm, T, micro_rows, gpus, [*own, *rest])
    config = load_config(overrides)
    plan = need(config, gpus)
    planned = {group: {part: size / GIB for part, size in parts.items()} for group, parts in vars(plan).items()}
    words = [*map(results.without_folders, (*own, *rest))]
    row: dict[str, Any] = {
        "preset": preset, "attention": arm, "T": T, "micro_rows": micro_rows, "dtype": config.trainer.dtype,
        "checkpointing": config.trainer.activation_checkpointing, "recomputed": list(config.trainer.computed_again),
        "zero": config.parallel.zero_stage, "gpus": gpus, "overrides": words, "planned_gib": planned,
        "planned_total_gib": plan.total / GIB,
    }  # fmt: skip
    name = "-".join(str(word) for word in (*case[:4], row["dtype"], *row["recomputed"], row["zero"]))
    places = [f"name={name}", f"runs_dir={folder}", f"data.prepared_dir={folder}/prepared"]
    run = train_run(folder / name, [*overrides, *places], processes=gpus)
    if run.error:
        return {**row, "error": run.error}
    peak = max(logged["mem_gib"] for logged in run.logged)
    return {**row, "peak_gib": peak, "ratio": peak * GIB / plan.total}


def plan_of(row: dict[str, Any]) -> Memory:
    """What the plan says today of the run behind a row."""
    preset, arm, T, micro_rows, gpus = (row[key] for key in ("preset", "attention", "T", "micro_rows", "gpus"))
    return need(load_config(overrides_of(preset, arm, T, micro_rows, gpus, row["overrides"])), gpus)


def markdown(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """A table of (name of the GPU, row), with today's plans."""
    lines = [
        "| GPU | preset, arm | T | rows | dtype | ZeRO | states | kept | passing | planned GiB | peak GiB | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for device, row in rows:
        again = ", ".join(parts_recomputed(row))
        plan = plan_of(row)
        states, kept = (sum(parts.values()) / GIB for parts in (plan.states, plan.kept))
        passing, total = max(plan.passing.values()) / GIB, plan.total / GIB
        measured = "failed | -" if "error" in row else f"{row['peak_gib']:.1f} | {row['peak_gib'] / total:.2f}"
        lines.append(
            f"| {row['gpus']} x {device} | `{row['preset']}`, {row['attention']} | {row['T'] // 1024}k | "
            f"{row['micro_rows']} | {row['dtype']}{again and f', recomputed: {again}'} | {row['zero']} | "
            f"{states:.1f} | {kept:.1f} | {passing:.1f} | {total:.1f} | {measured} |"
        )
    return "\n".join(lines)


def plot_memory(rows: Sequence[dict[str, Any]], path: Path, device: str) -> None:
    """Peaks beside what was planned when they were measured."""
    bars: list[dict[str, Any]] = []
    for row in rows:
        again = ", ".join(parts_recomputed(row))
        name = f"{row['gpus']} x {device}, {row['preset']}, {row['attention']}, {row['micro_rows']} x "
        name += f"{row['T'] // 1024}k, {row['dtype']}, ZeRO {row['zero']}" + (f", recomputed: {again}" if again else "")
        peak = {} if "error" in row else {"gib": row["peak_gib"]}
        bars += [
            {"run": name, "what": "planned", "gib": row["planned_total_gib"]},
            {"run": name, "what": "peak"} | peak,
        ]
    plot_bars(bars, path, "peak memory beside the plan's, GiB", "run", "what", "gib")


def main(arguments: list[str]) -> int:
    """Run the benchmark and write <out>/memory_<gpu>.json and a figure beside it; the exit code."""
    parser = argparse.ArgumentParser(prog="nsa-train bench memory", description=__doc__)
    parser.add_argument("--presets", nargs="+", default=["r1", "r2", "m"])
    args = parse_on_gpus(parser, arguments, "memory of GPUs")
    rows: list[dict[str, Any]] = []
    source = results.source(args.commit)
    name = f"memory_{results.gpu_label()}"
    with tempfile.TemporaryDirectory() as folder:
        for case in (case for case in CASES if case[0] in args.presets):
            rows.append(one_run(case, args.gpus, args.set, Path(folder)) | source)
            runtime.log.info("%s", rows[-1])
            every = results.with_earlier(args.out / f"{name}.json", rows, key_of)
            written = results.write_result(name, "memory", every, args.commit, args.out)
    plot_memory(every, written.with_suffix(".png"), torch.cuda.get_device_name())
    runtime.log.info("%s\n%s", markdown([(torch.cuda.get_device_name(), row) for row in rows]), written)
    return 0
