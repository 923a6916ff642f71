"""The figure of a comparison: curves over tokens, FLOPs and seconds, differences, and when runs learnt to copy.

One colour an arm, one kind of line and mark a seed. Hollow marks are of arms with fewer seeds than the rule asks for,
of which no interval is drawn: of two seeds it would hide all others.
"""

from __future__ import annotations

from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nsa_train.bench.figures import save_figure
from nsa_train.compare.levels import LEAST_SEEDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
KNOWN = (  # whose colours are the same in every figure
    "full", "full_gated", "nsa", "nsa_random", "window", "nsa_no_slc", "full_gated_wide", "nsa_shared_kv", "nsa_no_win",
)  # fmt: skip


def plot_comparison(rows: list[Row], path: Path) -> None:
    """From the rows of the JSON."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, MaxNLocator

    head = rows[0]
    arms = [row["arm"] for row in rows if row["what"] == "arm"]
    runs = [row for row in rows if row["what"] == "run"]
    differences = [row for row in rows if row["what"] == "difference" and row["baseline"] == head["baseline"]]
    colour = {arm: f"C{i}" for i, arm in enumerate(dict.fromkeys((*KNOWN, *arms))) if arm in arms}
    figure, axes = plt.subplots(3, 3, figsize=(15, 13.5), dpi=90)
    late = [point["loss"] for run in runs for point in _shown(head, run, FLAT_UNTIL)]
    margin = 0.05 * (max(late) - min(late)) + 0.01
    low, high = min(late) - margin, max(late) + margin
    for place, (key, label) in zip(axes[0], AXES, strict=True):
        _curves(place, [run for run in runs if key != "seconds" or run["alone_tokens_per_s"]], runs, key, colour)
        if head["unigram_entropy"] < high:
            place.axhline(head["unigram_entropy"], color="gray", lw=1, label="unigram entropy")
        place.set(title=f"validation loss over {key}", xlabel=label, ylabel="nats, rows of each seed", ylim=(low, high))
    leads = [(axes[1][0], FLAT_UNTIL, "along the run")]
    leads += [] if head["steps_before"] else [(axes[1][1], LATE_FROM, "in its last quarter")]
    for place, since, when in leads:
        _leads(place, head, runs, colour, since)
        place.set(title=f"validation loss minus that of {head['baseline']}, {when}", xlabel="tokens", ylabel="nats")
    for place, (kind, label) in zip(axes[2], CUTS, strict=False):
        _differences(place, [d for d in differences if d["cut"].startswith(kind) and "+" not in d["cut"]], colour)
        interval = ", 95% interval" if any(map(_enough, differences)) else ""
        place.axhline(0, color=colour[head["baseline"]], lw=1)
        place.set(title=f"held-out text minus {head['baseline']}, by {kind}{interval}", xlabel=label, ylabel="nats")
    ends, copying = axes[1][2], axes[2][2]
    for run in (run for run in runs if run["text_loss"] is not None):
        look = {"color": colour[run["arm"]], "marker": _of(MARKS, run), "ls": ""}
        ends.plot(arms.index(run["arm"]), run["text_loss"], **look)
        if run["tokens_to_copying"] is not None:
            copying.plot(run["tokens_to_copying"], run["text_loss"], **look)
    ends.set_xticks(range(len(arms)), arms, rotation=20, ha="right")
    ends.set(title="held-out text at the end, each seed", ylabel="loss, nats")
    _or_words(copying, "no run learnt to copy after its start")
    copying.set(title="the same, and when the run learnt to copy", xlabel="tokens to copying", ylabel="loss, nats")
    for place in axes.flat:
        place.grid(alpha=0.3)
        place.axis("on" if place.has_data() or place.texts else "off")
    for place in (place for place in (*axes[0][:2], *axes[1][:2], copying) if place.lines):
        place.xaxis.set_major_formatter(EngFormatter())
        place.xaxis.set_major_locator(MaxNLocator(5))
    for run in {run["seed"]: run for run in runs}.values():
        axes[0][0].plot([], [], color="gray", ls=_of(LINES, run), marker=_of(MARKS, run), label=f"seed {run['seed']}")
    axes[0][0].legend(fontsize=8)
    about = f"{head['experiment']}, {head['tokens']:,} tokens, corpus {head['corpus']['hash'][:12]}"
    figure.suptitle(f"{about}: {head['reached']}")
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    save_figure(figure, path)


def _curves(place: Axes, shown: list[Row], runs: list[Row], key: str, colour: dict[str, str]) -> None:
    for run in shown:
        first = run["seed"] == min(r["seed"] for r in runs if r["arm"] == run["arm"])
        at, losses = ([point[what] for point in run["val"]] for what in (key, "loss"))
        label = run["arm"] if first else None
        place.plot(at, losses, color=colour[run["arm"]], ls=_of(LINES, run), lw=1, label=label)
    _or_words(place, "no run was alone on its device,\nand no speed was measured apart")


def _leads(place: Axes, head: Row, runs: list[Row], colour: dict[str, str], since: float) -> None:
    """Validation loss minus that of the baseline's run of the same seed, between its validations on a straight line."""
    baseline = {run["seed"]: run["val"] for run in runs if run["arm"] == head["baseline"]}
    for run in (run for run in runs if run["arm"] != head["baseline"]):
        tokens, theirs = ([point[key] for point in baseline[run["seed"]]] for key in ("tokens", "loss"))
        at, ours = ([point[key] for point in _shown(head, run, since)] for key in ("tokens", "loss"))
        place.plot(at, ours - np.interp(at, tokens, theirs), color=colour[run["arm"]], ls=_of(LINES, run), lw=1)
    place.axhline(0, color=colour[head["baseline"]], lw=1)


def _differences(place: Axes, differences: list[Row], colour: dict[str, str]) -> None:
    buckets = list(dict.fromkeys(d["cut"] for d in differences))
    for arm in colour:
        mine = [d for d in differences if d["arm"] == arm]
        at = [buckets.index(d["cut"]) + 0.08 * ([*colour].index(arm) - len(colour) / 2) for d in mine]
        errors = [(d["high"] - d["low"]) / 2 if _enough(d) else nan for d in mine]
        if mine:
            inside = None if all(map(_enough, mine)) else "white"
            seeds = f"seed{'s' * (len(mine[0]['seeds']) > 1)} {', '.join(map(str, mine[0]['seeds']))}"
            place.errorbar(at, [d["mean"] for d in mine], errors, color=colour[arm], mfc=inside, marker="o", capsize=3,
                           lw=1, label=f"{arm}, {seeds}")  # fmt: skip
    place.set_xticks(range(len(buckets)), [bucket.split()[1] for bucket in buckets], rotation=30)
    if differences:
        place.legend(fontsize=7)


def _of(looks: tuple[str, ...], run: Row) -> str:
    """The kind of line or mark of the run's seed."""
    return looks[run["seed"] % len(looks)]


def _enough(d: Row) -> bool:
    return d["low"] is not None and len(d["seeds"]) >= LEAST_SEEDS


def _shown(head: Row, run: Row, since: float) -> list[Row]:
    """Validations but those before this share of the tokens, which would flatten the rest; all of a stage."""
    least = 0 if head["steps_before"] else since * head["tokens"]
    return [point for point in run["val"] if point["tokens"] >= least]


def _or_words(place: Axes, words: str) -> None:
    """What an empty place says."""
    if not place.lines:
        place.text(0.5, 0.5, words, ha="center", transform=place.transAxes)
        place.set(xticks=[], yticks=[])


FLAT_UNTIL, LATE_FROM = 0.1, 0.75  # of the tokens
LINES, MARKS = ("-", "--", ":", "-."), ("o", "s", "^", "D")  # by seed
AXES = (
    ("tokens", "tokens"),
    ("flops", "executed FLOPs, a row counted as one document"),
    ("seconds", "seconds of training alone on the device,\nvalidation and checkpoints aside"),
)
CUTS = (("position", "position in the document"), ("recall", "tokens back to what is recalled"))
