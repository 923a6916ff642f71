"""Figures made from results: against sequence length, as bars, and answers by length and depth."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from math import ceil, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = "os^DvPX*"  # by arm
PALETTE = 256  # colours of a PNG: a third of the bytes of all, and nothing that one sees


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure of pyplot as a small PNG, its folder too, and close it."""
    import matplotlib.pyplot as plt
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(drawn).convert("RGB").quantize(PALETTE).save(path, optimize=True)


def totals(
    rows: list[dict[str, Any]], widths: tuple[int, int], part: str, docs: int
) -> dict[tuple[str, str], dict[int, float]]:
    """Forward + backward ms of `docs` documents by T: {(impl, indices): {T: ms}}; lengths with both passes only."""
    found: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for row in rows:
        if "ms" in row and row["part"] == part and row["docs"] == docs and (row["d_qk"], row["d_v"]) == widths:
            by_length = found.setdefault((row["impl"], row["indices"] or ""), {})
            by_length.setdefault(row["T"], {})[row["pass"]] = row["ms"]
    return {
        key: {T: sum(ms.values()) for T, ms in sorted(by_length.items()) if len(ms) == 2}
        for key, by_length in found.items()
    }


def plot_attention(result: dict[str, Any], path: Path, widths: tuple[int, int] = (192, 128)) -> None:
    """Left: forward + backward ms against T. Right: the fastest dense kernel's time over ours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ours = {f"NSA, {indices} blocks": ms for (_, indices), ms in totals(result["rows"], widths, "op", 1).items()}
    dense = {impl: ms for (impl, _), ms in totals(result["rows"], widths, "dense", 1).items()}
    figure, (time, speed) = plt.subplots(1, 2, figsize=(10, 4), dpi=110)
    for name, ms in {**ours, **dense}.items():
        time.plot(ms.keys(), ms.values(), marker="o", ls="-" if name in ours else "--", label=name)
    for name, ms in ours.items():
        best = {T: min(d[T] for d in dense.values() if T in d) for T in ms if any(T in d for d in dense.values())}
        speed.plot(best.keys(), [best[T] / ms[T] for T in best], marker="o", label=name)
    speed.axhline(1, color="gray", lw=1)
    for axes, label in ((time, "forward + backward, ms"), (speed, "times faster than the fastest dense kernel")):
        _by_length(axes)
        axes.set(xlabel="tokens of one document", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    time.set_yscale("log")
    device = result["device"]["name"]
    figure.suptitle(f"{device}, bf16, 64 query and 4 KV heads, {widths[0]}/{widths[1]}, commit {result['commit']:.7}")
    figure.tight_layout()
    save_figure(figure, path)


def _by_length(axes: Axes) -> None:
    """A horizontal axis of tokens: 8k, 16k and so on."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}k")


def plot_training(result: dict[str, Any], path: Path) -> None:
    """Of whole runs, against the length of a row: tokens per second of a GPU, and the share of its peak."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = _lines([row for row in result["rows"] if row["gpus"] == 1 and "tokens_per_s" in row])
    figure, (speed, share) = plt.subplots(1, 2, figsize=(13, 4), dpi=110)
    presets, arms = (list(dict.fromkeys(key[place] for key in lines)) for place in (0, 1))
    for (preset, arm, *words), rows in lines.items():
        look = {
            "color": f"C{presets.index(preset)}", "label": ", ".join([preset, arm, *words]),
            "ls": "-" if arm == "nsa" else "--", "marker": MARKS[arms.index(arm) % len(MARKS)],
        }  # fmt: skip
        lengths = [row["T"] for row in rows]
        speed.plot(lengths, [row["tokens_per_s"] for row in rows], **look)
        share.plot(lengths, [100 * row["mfu_executed"] for row in rows], **look)
    for axes, label in ((speed, "tokens per second"), (share, "MFU of executed FLOPs, %")):
        _by_length(axes)
        axes.set(xlabel="tokens of a row", ylabel=label)
        axes.grid(alpha=0.3)
    speed.set_yscale("log")
    share.set_ylim(bottom=0)
    share.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.suptitle(f"training on one {result['device']['name']}, packed text")
    figure.tight_layout()
    save_figure(figure, path)


def _lines(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """Rows by preset and arm, the shortest first.

    Those of a preset that has two rows of one arm and length are told apart further: by rows a step, text and settings.
    """
    places = [(row["preset"], row["attention"], row["T"]) for row in rows]
    crowded = {place[0] for place in places if places.count(place) > 1}
    lines: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["T"]):
        words = [word for word in row["overrides"] if not word.startswith(("data.", "trainer.batch_rows="))]
        further = [f"{row['batch_rows']} rows a step", *words] if row["preset"] in crowded else []
        lines.setdefault((row["preset"], row["attention"], *further), []).append(row)
    return lines


def plot_bars(rows: Sequence[dict[str, Any]], path: Path, about: str, group: str, label: str, value: str) -> None:
    """A bar for each row, its figure beside it, in panels.

    group, label, value  keys of a row: the title of its panel, the name of its bar, and its figure, without which it
                         failed and keeps its place
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault(str(row[group]), []).append(row)
    heights = [1 + len(bars) for bars in panels.values()]
    size = (10, 0.6 + 0.3 * sum(heights))
    figure, axes = plt.subplots(
        len(panels), 1, figsize=size, dpi=110, squeeze=False, height_ratios=heights, layout="constrained"
    )
    for place, (title, bars) in zip(axes[:, 0], panels.items(), strict=True):
        drawn = place.barh(range(len(bars)), [bar.get(value, 0.0) for bar in bars], color="C0")
        place.bar_label(drawn, [_shown(bar[value]) if value in bar else "failed" for bar in bars], padding=3)
        place.set_yticks(range(len(bars)), [bar[label] for bar in bars])
        place.set_title(title, fontsize=10)
        place.margins(x=0.25)
        place.invert_yaxis()
        place.grid(axis="x", alpha=0.3)
    figure.suptitle(about)
    save_figure(figure, path)


def _shown(value: float) -> str:
    if value < 1e3:
        return f"{value:.4g}"
    return f"{value:,.0f}" if value < 1e6 else f"{value / 1e6:,.1f} M"


def plot_grids(grids: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """Heat maps of accuracy, four in a row, each under its title: lengths across and depths down.

    A cell is a row with length, depth, accuracy and zone; one with a zone needs no selection and is grey.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths, depths = (sorted({row[key] for rows in grids.values() for row in rows}) for key in ("length", "depth"))
    across = min(4, len(grids))
    down = ceil(len(grids) / across)
    size = (2 + across * (1 + 1.1 * len(lengths)), 1 + down * (1 + 0.25 * len(depths)))
    figure, axes = plt.subplots(down, across, figsize=size, dpi=110, squeeze=False, layout="constrained")
    for place in axes.flat[len(grids) :]:
        place.axis("off")
    for place, (title, rows) in zip(axes.flat, grids.items(), strict=False):
        values = [[nan] * len(lengths) for _ in depths]
        for row in rows:
            x, y = lengths.index(row["length"]), depths.index(row["depth"])
            values[y][x] = row["accuracy"]
            if row["zone"]:
                place.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, color="lightgray"))
        image = place.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        place.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        place.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        place.set(xlabel="tokens of the document", ylabel="depth of the fact", title=title)
    figure.colorbar(image, ax=axes, label="answers that are right in every token")
    figure.supxlabel("grey: seen through forced blocks or the window, not counted", x=0.01, ha="left", fontsize=9)
    save_figure(figure, path)
