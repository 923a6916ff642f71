"""`nsa-train bench training`: tokens per second of whole training runs, by preset, arm and row length.

A step and a forward pass have as many tokens as the preset's at its own row length, a row at least; where the plan says
that activations do not fit the GPU, it chooses what is recomputed. FLOPs are counted as if every row were one document:
packs of short documents need fewer; what is recomputed does not count. `parts` are milliseconds of a step by part
(`nsa_train.train.profile`), of one before those that are timed; `dense_kernels` are what full attention ran on,
`cuda_graphs` is whether passes were replayed, `past_half` is the share of the corpus' tokens past the T / 2-th of their
document: half where each row is one document. Rows that the file has of other runs stay in it. A figure lies beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from nsa_train import runtime
from nsa_train.bench import results, runs
from nsa_train.bench.figures import plot_training
from nsa_train.bench.runs import MEASURED_ONLY, parse_on_gpus, parts_recomputed, train_run
from nsa_train.config.load import load_config
from nsa_train.config.schema import Config
from nsa_train.data.loader import Loader
from nsa_train.data.prepare import prepare
from nsa_train.data.stages import largest_divisor, stages_of
from nsa_train.data.store import TokenStore
from nsa_train.errors import NsaTrainError
from nsa_train.plan.advice import Run, need, recomputation, room
from nsa_train.plan.flops import training_flops
from nsa_train.plan.speed import GPUS, kind_of

LOG_EVERY, SPEEDS = 3, 3  # steps that a speed is a mean over, and so many of these at least
PROFILE = ("profile=trace", "profile.skip=6", "profile.steps=1")
key_of = partial(
    runs.key_of, keys=("preset", "attention", "T", "gpus", "zero", "micro_batch", "batch_rows", "checkpointing")
)
PROFILED = 9  # steps after which start-up, compilation and profile are over
LEAST_STEPS = PROFILED + LOG_EVERY * SPEEDS


def overrides_of(preset: str, arm: str, T: int, steps: int, gpus: int, rest: list[str]) -> list[str]:
    own = [f"experiment={preset}", f"attention={arm}", *rest]
    trainer = load_config(own).trainer
    micro_rows, batch_rows = (rows * trainer.seq_len // T for rows in (trainer.micro_rows, trainer.batch_rows))
    words = [
        *own, f"trainer.seq_len={T}", f"trainer.micro_rows={max(1, micro_rows)}",
        f"trainer.batch_rows={max(gpus, batch_rows)}", f"trainer.steps={steps}", f"trainer.log_every={LOG_EVERY}",
        f"trainer.val_every={steps}", *MEASURED_ONLY, *PROFILE,
    ]  # fmt: skip
    kind = kind_of(torch.cuda.get_device_name())
    if kind is None:
        return words
    run = Run(load_config(words), gpus, kind)
    choices = [run, *recomputation(run)]  # none that fits: the one that recomputes most
    return [*words, *next((c for c in choices if need(c.config, gpus).total <= room(GPUS[kind])), choices[-1]).words]


def settings_of(row: dict[str, Any]) -> list[str]:
    """Overrides that decide the size of the run behind a row."""
    words = [
        f"experiment={row['preset']}", f"attention={row['attention']}", *row["overrides"],
        f"trainer.seq_len={row['T']}", f"trainer.micro_rows={row['micro_batch']}",
        f"trainer.batch_rows={row['batch_rows']}", f"trainer.activation_checkpointing={row['checkpointing']}",
    ]  # fmt: skip
    parts = parts_recomputed(row)
    return [*words, f"trainer.recomputed=[{','.join(parts)}]"] if parts else words


def figures(
    speeds: list[float], config: Config, full: Config, gpus: int, peak_flops: float | None
) -> dict[str, float | None]:
    """Speed and MFU: of the FLOPs executed, and of those that full attention would take for the same tokens."""
    speed = statistics.median(speeds)
    share = speed / (gpus * peak_flops) if peak_flops else None
    return {
        "tokens_per_s": speed, "tokens_per_s_min": min(speeds), "tokens_per_s_max": max(speeds),
        "step_ms": 1e3 * config.trainer.batch_rows * config.trainer.seq_len / speed,
        "mfu_executed": share and share * training_flops(config), "mfu_dense": share and share * training_flops(full),
    }  # fmt: skip


def text_of(config: Config) -> dict[str, Any]:
    """The corpus of a run, and how long its documents are beside the rows."""
    store = TokenStore.open(prepare(config.data, config.model.vocab, runtime.log.info), "train")
    loader = Loader(store, stages_of(config), config.data, config.seed)
    return {"corpus": store.manifest["name"], "past_half": loader.share_past(0, config.trainer.seq_len // 2)}


def one_run(preset: str, arm: str, T: int, steps: int, gpus: int, rest: list[str], folder: Path) -> dict[str, Any]:
    """A row; with `error` in place of figures where the run failed."""
    overrides = overrides_of(preset, arm, T, steps, gpus, rest)
    config, full = load_config(overrides), load_config([*overrides, "attention=full"])
    per_rank = config.trainer.batch_rows // gpus
    row: dict[str, Any] = {
        "preset": preset, "attention": arm, "T": T, "gpus": gpus, "zero": config.parallel.zero_stage, "ep": 1, "sp": 1,
        "micro_batch": largest_divisor(per_rank, config.trainer.micro_rows), "batch_rows": config.trainer.batch_rows,
        "checkpointing": config.trainer.activation_checkpointing, "recomputed": list(config.trainer.computed_again),
        "overrides": [*map(results.without_folders, rest)],
    }  # fmt: skip
    name = f"{preset}-{arm}-{T}"
    places = [f"name={name}", f"runs_dir={folder}", f"data.prepared_dir={folder}/prepared"]
    run = train_run(folder / name, [*overrides, *places], processes=gpus)
    row["command_s"] = run.command_s
    if run.error:
        return {**row, "error": run.error}
    speeds = [r["tokens_per_s"] for r in run.logged if r["step"] > PROFILED and r["step"] % LOG_EVERY == 0]
    kind = kind_of(torch.cuda.get_device_name())
    parts = json.loads((folder / name / "profile" / "parts.json").read_text())["parts"]
    manifest = json.loads((folder / name / "manifest.json").read_text())
    return {
        **row, **figures(speeds, config, full, gpus, GPUS[kind].flops if kind else None),
        "peak_gib": max(r["mem_gib"] for r in run.logged), "parts": parts, "dense_kernels": run.dense_kernels,
        "cuda_graphs": manifest["cuda_graphs"],
        **text_of(load_config([*overrides, *places])),
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run the benchmark and write <out>/training_<gpu>.json; the exit code."""
    parser = argparse.ArgumentParser(prog="nsa-train bench training", description=__doc__)
    parser.add_argument("--presets", nargs="+", default=["r1"])
    parser.add_argument("--arms", nargs="+", default=["nsa", "full"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192], metavar="T")
    parser.add_argument("--steps", type=int, default=45, help=f"of each run, {LEAST_STEPS} at least")
    args = parse_on_gpus(parser, arguments, "training on GPUs")
    if args.steps < LEAST_STEPS:
        raise NsaTrainError(f"bench training: --steps {args.steps} is too few for a speed; use {LEAST_STEPS} or more")
    rows: list[dict[str, Any]] = []
    name = f"training_{results.gpu_label()}"
    source = results.source(args.commit)
    with tempfile.TemporaryDirectory() as folder:
        for preset, T, arm in product(args.presets, args.lengths, args.arms):
            rows.append(one_run(preset, arm, T, args.steps, args.gpus, args.set, Path(folder)) | source)
            runtime.log.info("%s", rows[-1])
            every = results.with_earlier(args.out / f"{name}.json", rows, key_of)
            written = results.write_result(name, "training", every, args.commit, args.out)
            plot_training(json.loads(written.read_text()), written.with_suffix(".png"))
    runtime.log.info("%s", written)
    return 0
