"""The figure of a comparison: curves over tokens, FLOPs and seconds, differences, and when runs learnt to copy."""

from __future__ import annotations

from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nsa_train.bench.figures import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]


def plot_comparison(rows: list[Row], path: Path) -> None:
    """From the rows of the JSON. One colour an arm; thin lines are seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, MaxNLocator

    head = rows[0]
    arms = [row["arm"] for row in rows if row["what"] == "arm"]
    runs = [row for row in rows if row["what"] == "run"]
    differences = [row for row in rows if row["what"] == "difference" and row["baseline"] == head["baseline"]]
    colour = {arm: f"C{i}" for i, arm in enumerate(arms)}
    figure, axes = plt.subplots(2, 4, figsize=(20, 9), dpi=100)
    late = [point["loss"] for run in runs for point in _shown(head, run)]
    margin = 0.05 * (max(late) - min(late)) + 0.01
    low, high = min(late) - margin, max(late) + margin
    for place, (key, label) in zip(axes[0][:3], AXES, strict=True):
        _curves(place, [run for run in runs if key != "seconds" or run["alone_tokens_per_s"]], runs, key, colour)
        if head["unigram_entropy"] < high:
            place.axhline(head["unigram_entropy"], color="gray", ls="--", lw=1, label="unigram entropy")
        place.set(xlabel=label, ylabel="held-out loss, nats per token", ylim=(low, high))
    _leads(axes[0][3], head, runs, colour)
    for place, (kind, label) in zip(axes[1][:2], CUTS, strict=True):
        _differences(place, [d for d in differences if d["cut"].startswith(kind) and "+" not in d["cut"]], colour)
        interval = ", 95% interval" if any(d["low"] is not None for d in differences) else ", one seed"
        place.axhline(0, color=colour[head["baseline"]], lw=1)
        place.set(xlabel=label, ylabel=f"loss of text minus that of {head['baseline']}{interval}")
    for run in (run for run in runs if run["text_loss"] is not None):
        axes[1][2].plot(arms.index(run["arm"]), run["text_loss"], "o", color=colour[run["arm"]])
        if run["tokens_to_copying"] is not None:
            axes[1][3].plot(run["tokens_to_copying"], run["text_loss"], "o", color=colour[run["arm"]])
    axes[1][2].set_xticks(range(len(arms)), arms, rotation=30)
    axes[1][2].set(ylabel="held-out loss of text at the end, each seed")
    _or_words(axes[1][3], "no run learnt to copy after its start")
    axes[1][3].set(xlabel="tokens to copying", ylabel="held-out loss of text at the end")
    for place in axes.flat:
        place.grid(alpha=0.3)
    for place in (place for place in (axes[0][0], axes[0][1], axes[0][3], axes[1][3]) if place.lines):
        place.xaxis.set_major_formatter(EngFormatter())
        place.xaxis.set_major_locator(MaxNLocator(5))
    axes[0][0].legend()
    reached = f"{head['level']}: {head['title']}" if head["level"] else "no level reached"
    figure.suptitle(f"{head['experiment']}, {head['tokens']:,} tokens, corpus {head['corpus']['hash'][:12]}. {reached}")
    figure.tight_layout()
    save_figure(figure, path)


def _curves(place: Axes, shown: list[Row], runs: list[Row], key: str, colour: dict[str, str]) -> None:
    for run in shown:
        first = run["seed"] == min(r["seed"] for r in runs if r["arm"] == run["arm"])
        points = [(point[key], point["loss"]) for point in run["val"]]
        place.plot(*zip(*points, strict=True), color=colour[run["arm"]], lw=1, label=run["arm"] if first else None)  # type: ignore[arg-type]
    _or_words(place, "no run was alone on its device,\nand no speed was measured apart")


def _leads(place: Axes, head: Row, runs: list[Row], colour: dict[str, str]) -> None:
    """Validation loss minus that of the baseline's run of the same seed, between its validations on a straight line."""
    baseline = {run["seed"]: run["val"] for run in runs if run["arm"] == head["baseline"]}
    for run in (run for run in runs if run["arm"] != head["baseline"]):
        tokens, theirs = ([point[key] for point in baseline[run["seed"]]] for key in ("tokens", "loss"))
        at, ours = ([point[key] for point in _shown(head, run)] for key in ("tokens", "loss"))
        place.plot(at, ours - np.interp(at, tokens, theirs), color=colour[run["arm"]], lw=1)
    place.axhline(0, color=colour[head["baseline"]], lw=1)
    place.set(xlabel="tokens", ylabel=f"held-out loss minus that of {head['baseline']}, seed by seed")


def _differences(place: Axes, differences: list[Row], colour: dict[str, str]) -> None:
    buckets = list(dict.fromkeys(d["cut"] for d in differences))
    for arm in colour:
        mine = [d for d in differences if d["arm"] == arm]
        at = [buckets.index(d["cut"]) + 0.08 * ([*colour].index(arm) - len(colour) / 2) for d in mine]
        errors = [(d["high"] - d["low"]) / 2 if d["low"] is not None else nan for d in mine]  # one seed has none
        if mine:
            place.errorbar(at, [d["mean"] for d in mine], errors, color=colour[arm], marker="o", capsize=3, lw=1)
    place.set_xticks(range(len(buckets)), [bucket.split()[1] for bucket in buckets], rotation=30)


def _shown(head: Row, run: Row) -> list[Row]:
    """Validations but the first ones of a run from scratch, which would flatten the rest."""
    least = 0 if head["steps_before"] else FLAT_UNTIL * head["tokens"]
    return [point for point in run["val"] if point["tokens"] >= least]


def _or_words(place: Axes, words: str) -> None:
    """What an empty place says."""
    if not place.lines:
        place.text(0.5, 0.5, words, ha="center", transform=place.transAxes)
        place.set(xticks=[], yticks=[])


FLAT_UNTIL = 0.1  # of the tokens
AXES = (
    ("tokens", "tokens"),
    ("flops", "executed FLOPs, a row counted as one document"),
    ("seconds", "seconds of training alone on the device,\nvalidation and checkpoints aside"),
)
CUTS = (("position", "position in the document"), ("recall", "tokens back to what is recalled"))
