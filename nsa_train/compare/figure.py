"""The figure of a comparison: curves over tokens, FLOPs and seconds, and differences by position and distance."""

from __future__ import annotations

from math import nan
from pathlib import Path
from typing import Any

from nsa_train.bench.figures import save_figure


def plot_comparison(rows: list[dict[str, Any]], path: Path) -> None:
    """From the rows of the JSON. One colour an arm; thin lines are seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    head = rows[0]
    arms = [row["arm"] for row in rows if row["what"] == "arm"]
    runs = [row for row in rows if row["what"] == "run"]
    differences = [row for row in rows if row["what"] == "difference" and row["baseline"] == head["baseline"]]
    colour = {arm: f"C{i}" for i, arm in enumerate(arms)}
    late = [point["loss"] for run in runs for point in run["val"] if point["tokens"] >= SHOWN_FROM * head["tokens"]]
    margin = 0.05 * (max(late) - min(late)) + 0.01
    figure, axes = plt.subplots(2, 3, figsize=(16, 9), dpi=100)
    for place, (key, label) in zip(axes[0], AXES, strict=True):
        for run in (run for run in runs if key != "seconds" or run["runs_a_device"] == 1):
            first = run["seed"] == min(r["seed"] for r in runs if r["arm"] == run["arm"])
            points = [(point[key], point["loss"]) for point in run["val"]]
            place.plot(*zip(*points, strict=True), color=colour[run["arm"]], lw=1, label=run["arm"] if first else None)  # type: ignore[arg-type]
        if not place.lines:
            place.text(0.5, 0.5, "no run was alone on its device", ha="center", transform=place.transAxes)
        if head["unigram_entropy"] < max(late) + margin:
            place.axhline(head["unigram_entropy"], color="gray", ls="--", lw=1, label="unigram entropy")
        place.set(xlabel=label, ylabel="held-out loss, nats per token", ylim=(min(late) - margin, max(late) + margin))
    for place, kind, label in zip(
        axes[1], ("position", "recall"), ("position in the document", "tokens back to what is recalled"), strict=False
    ):
        buckets = list(
            dict.fromkeys(d["cut"] for d in differences if d["cut"].startswith(kind) and "+" not in d["cut"])
        )
        for arm in arms:
            mine = [d for d in differences if d["arm"] == arm and d["cut"] in buckets]
            at = [buckets.index(d["cut"]) + 0.08 * (arms.index(arm) - len(arms) / 2) for d in mine]
            errors = [(d["high"] - d["low"]) / 2 if d["low"] is not None else nan for d in mine]  # one seed has none
            if mine:
                place.errorbar(at, [d["mean"] for d in mine], errors, color=colour[arm], marker="o", capsize=3, lw=1)
        interval = ", 95% interval" if any(d["low"] is not None for d in differences) else ", one seed"
        place.axhline(0, color=colour[head["baseline"]], lw=1)
        place.set_xticks(range(len(buckets)), [bucket.split()[1] for bucket in buckets], rotation=30)
        place.set(xlabel=label, ylabel=f"loss of text minus that of {head['baseline']}{interval}")
    last = axes[1][2]
    for run in runs:
        if run["text_loss"] is not None:
            last.plot(arms.index(run["arm"]), run["text_loss"], "o", color=colour[run["arm"]])
    last.set_xticks(range(len(arms)), arms, rotation=30)
    last.set(ylabel="held-out loss of text at the end, each seed")
    for place in axes.flat:
        place.grid(alpha=0.3)
    axes[0][0].legend()
    reached = f"{head['level']}: {head['title']}" if head["level"] else "no level reached"
    figure.suptitle(f"{head['experiment']}, {head['tokens']:,} tokens, corpus {head['corpus']['hash'][:12]}. {reached}")
    figure.tight_layout()
    save_figure(figure, path)


SHOWN_FROM = 0.1  # of the tokens: what comes before would flatten the rest
AXES = (
    ("tokens", "tokens"),
    ("flops", "executed FLOPs, a row counted as one document"),
    ("seconds", "seconds of training alone on the device,\nvalidation and checkpoints aside"),
)
