"""Where a run speaks: metrics.jsonl, the console and Weights & Biases, from one place, on rank 0 only.

metrics.jsonl is the record: one object a line, no step twice. Losses are nats per token, cross-entropy only.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nsa_train import runtime
from nsa_train.config import schema
from nsa_train.config.load import to_tree

METRICS = "metrics.jsonl"
WANDB_OFF = "W&B is off from here on (metrics.jsonl is complete without it)"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a metrics file; a torn or damaged one is left out."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [row for row in found if isinstance(row, dict) and "step" in row]


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads any more (`| head`, a closed terminal): the run goes on in silence."""
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()


class Metrics:
    """`step` is the number of finished steps, and with `tokens` the x-axis of every figure."""

    def __init__(self, config: schema.Config, run_dir: Path, step: int, manifest: dict[str, Any]) -> None:
        self.config, self.run_dir = config, run_dir
        kept = [row for row in read_metrics(run_dir / METRICS) if row["step"] <= step] if step else []
        aside = run_dir / f".{METRICS}.tmp"
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept))
        aside.replace(run_dir / METRICS)
        self._file = (run_dir / METRICS).open("a")
        self._wandb = _start_wandb(config, run_dir, manifest)
        self._corpus = manifest["corpus"]["hash"][:12]
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(),
            console=_Console(file=sys.stdout), disable=not sys.stdout.isatty(),
        )  # fmt: skip
        self._task = self._bar.add_task("training", total=config.trainer.steps, completed=step)
        self._bar.start()

    def progress(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def say(self, line: str) -> None:
        """A line for people, above the progress bar if there is one."""
        self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def train(self, row: dict[str, Any], loads: list[list[float]]) -> None:
        """A log step; loads [MoE layers, E] are tokens per expert, in the step.

        The row's `dead_experts`, like `load_peak`, has one number for each MoE layer; W&B's layers are the model's.
        """
        peaks = [max(load) * len(load) / max(sum(load), 1.0) for load in loads]  # of the step, in mean loads
        self._write({**row, "split": "train", "load_peak": peaks})
        loss = "non-finite" if row["loss"] is None else f"{row['loss']:.4f}"
        loss += " (a jump)" * row["spike"] + ", skipped" * row["skipped"]
        self.say(
            f"step {row['step']:>6}  tokens {row['tokens']:>11,}  loss {loss}  lr {row['lr']:.2e}  "
            f"grad {row['grad_norm'] or math.nan:.3f}  {row['tokens_per_s']:,.0f} tok/s  {row['mem_gib']:.2f} GiB"
        )
        if self._wandb:
            import wandb

            apart = ("step", "tokens", "by_source", "dead_experts")
            shown = {k: v for k, v in row.items() if k not in apart and v is not None}
            by_source = {f"train_by_source/{source}": loss for source, loss in row["by_source"].items()}
            experts: dict[str, Any] = {}
            for i, (load, peak, dead) in enumerate(
                zip(loads, peaks, row["dead_experts"], strict=True), start=self.config.model.dense_layers
            ):
                experts[f"experts/layer_{i}"] = wandb.Histogram(np_histogram=(load, list(range(len(load) + 1))))
                experts |= {f"experts/layer_{i}_peak": peak, f"experts/layer_{i}_dead": dead}
            self._log(row, {f"train/{k}": v for k, v in shown.items()} | by_source | experts)

    def validation(self, row: dict[str, Any]) -> None:
        self._write({**row, "split": "val"})
        by_position = "  ".join(f"{bucket} {loss:.3f}" for bucket, loss in row["by_position"].items())
        self.say(
            f"step {row['step']:>6}  tokens {row['tokens']:>11,}  held-out loss {row['loss']:.4f}  "
            f"(corpus {self._corpus}; by position: {by_position})"
        )
        if self._wandb:
            flat = {"val/loss": row["loss"]}
            flat |= {f"val_by_position/{bucket}": loss for bucket, loss in row["by_position"].items()}
            flat |= {f"val_by_place/{bucket}": loss for bucket, loss in row["by_place"].items()}
            flat |= {f"val_by_source/{source}": loss for source, loss in row["by_source"].items()}
            for i, layer in enumerate(row.get("layers", [])):
                flat[f"common/layer_{i}"] = layer["common"]
                flat |= {f"gates/layer_{i}_{branch}": mean for branch, mean in layer.get("gates", {}).items()}
                flat |= {f"selection/layer_{i}_{name}": value for name, value in layer.get("selection", {}).items()}
            self._log(row, flat)

    def close(self, summary: dict[str, Any]) -> None:
        self._bar.stop()
        self._file.close()
        self._tell_wandb(lambda run: run.summary.update({k: v for k, v in summary.items() if v is not None}))
        self._tell_wandb(lambda run: run.finish(exit_code=summary["exit_code"]))

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(_finite(row)) + "\n")
        self._file.flush()

    def _log(self, row: dict[str, Any], values: dict[str, Any]) -> None:
        values |= {"tokens": row["tokens"], "trainer/step": row["step"]}
        self._tell_wandb(lambda run: run.log(values, step=row["step"]))

    def _tell_wandb(self, what: Callable[[Any], object]) -> None:
        """W&B may fail in any way, training may not."""
        if self._wandb:
            try:
                what(self._wandb)
            except Exception as error:
                self._wandb = None
                runtime.log.warning("%s: %s", WANDB_OFF, error)


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _start_wandb(config: schema.Config, run_dir: Path, manifest: dict[str, Any]) -> Any:
    """The run named in the manifest, begun or gone on with; None when disabled. W&B may fail, training may not."""
    mode = runtime.wandb_mode(config.logging.wandb)
    if mode == "disabled":
        return None
    try:
        import wandb

        run = wandb.init(
            id=manifest["wandb_id"], resume="allow", mode=mode, dir=str(run_dir), project=config.logging.project,
            name=config.name, group=config.logging.group or config.experiment,
            tags=[config.arm, *config.logging.tags],
            config={**to_tree(config), "commit": manifest["commit"], "corpus_hash": manifest["corpus"]["hash"]},
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
    except Exception as error:
        runtime.log.warning("%s: %s", WANDB_OFF, error)
        return None
    run.define_metric("tokens")
    run.define_metric("trainer/step")
    run.define_metric("*", step_metric="tokens")
    return run


def plot_losses(run_dir: Path, title: str, unigram_entropy: float) -> None:
    """loss.png: train and held-out loss over tokens, and the entropy that word frequencies alone reach."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(run_dir / METRICS)
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    for split, style in (("train", {"lw": 1, "alpha": 0.6}), ("val", {"marker": "o", "lw": 1.5})):
        points = [(row["tokens"], row["loss"]) for row in rows if row["split"] == split and row["loss"] is not None]
        axes.plot(*zip(*points, strict=True), label={"train": "train", "val": "held-out"}[split], **style)
    axes.axhline(unigram_entropy, color="gray", ls="--", lw=1, label="unigram entropy")
    axes.set(xlabel="tokens", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    try:
        figure.savefig(run_dir / "loss.png")
    except OSError as error:
        runtime.log.warning("loss.png is not written: %s", error)
    plt.close(figure)


class Clock:
    """Tokens per second and waiting time between two log steps."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.started, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def elapsed(self) -> float:
        return time.perf_counter() - self.started
