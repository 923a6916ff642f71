"""Figures of benchmarks: what they show, and that rows without figures do not stop them."""

import matplotlib.pyplot as plt
import pytest

from nsa_train.bench.figures import plot_bars, plot_training


def row(preset, arm, T, speed, gpus=1, rows=8, overrides=()):
    return {
        "preset": preset, "attention": arm, "T": T, "gpus": gpus, "batch_rows": rows, "overrides": overrides,
        "tokens_per_s": speed, "mfu_executed": 0.25,
    }  # fmt: skip


@pytest.fixture
def shown(monkeypatch):
    """The figures that were written, still open."""
    figures = []
    close = plt.close
    monkeypatch.setattr(plt, "close", figures.append)
    yield figures
    for figure in figures:
        close(figure)


def test_training_shows_single_gpus_by_length_and_leaves_failed_rows_out(tmp_path, shown):
    rows = [row("m", "nsa", 65536, 50.0), row("m", "nsa", 8192, 40.0), row("m", "full", 8192, 45.0)]
    rows += [row("m", "nsa", 8192, 80.0, gpus=2), {"preset": "m", "attention": "full", "T": 1, "gpus": 1, "error": "x"}]
    path = tmp_path / "training.png"
    plot_training({"rows": rows, "device": {"name": "a GPU"}}, path)
    assert path.stat().st_size > 0
    speed, share = shown[0].axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in speed.lines}
    assert lines == {"m, nsa": ([8192, 65536], [40.0, 50.0]), "m, full": ([8192], [45.0])}
    assert [list(line.get_ydata()) for line in share.lines] == [[25.0, 25.0], [25.0]]


def test_training_tells_apart_what_a_preset_has_two_rows_of(tmp_path, shown):
    graphs = ["trainer.cuda_graphs=true", "data.root=text", "trainer.batch_rows=8"]
    rows = [row("r1", "nsa", 8192, 40.0), row("r1", "nsa", 8192, 60.0, rows=2), row("r1", "window", 8192, 90.0, rows=2)]
    rows += [
        row("r1", "nsa", 8192, 50.0, overrides=graphs),
        row("m", "nsa", 8192, 4.0),
        row("m", "nsa", 65536, 5.0, rows=1),
    ]
    plot_training({"rows": rows, "device": {"name": "a GPU"}}, tmp_path / "training.png")
    lines = {line.get_label(): list(line.get_ydata()) for line in shown[0].axes[0].lines}
    assert lines == {
        "r1, nsa, 8 rows a step": [40.0], "r1, nsa, 2 rows a step": [60.0], "r1, window, 2 rows a step": [90.0],
        "r1, nsa, 8 rows a step, trainer.cuda_graphs=true": [50.0], "m, nsa": [4.0, 5.0],
    }  # fmt: skip
    marks = {line.get_label(): line.get_marker() for line in shown[0].axes[0].lines}
    assert marks["r1, nsa, 8 rows a step"] == marks["m, nsa"] != marks["r1, window, 2 rows a step"]


def test_bars_stand_in_panels_with_their_values_and_failed_rows_keep_their_place(tmp_path, shown):
    rows = [
        {"load": "even", "impl": "ours", "ms": 2.5}, {"load": "even", "impl": "theirs", "error": "no memory"},
        {"load": "skewed", "impl": "ours", "ms": 48_600_000.0}, {"load": "skewed", "impl": "theirs", "ms": 12_345.6},
    ]  # fmt: skip
    path = tmp_path / "bars.png"
    plot_bars(rows, path, "a GPU", "load", "impl", "ms")
    assert path.read_bytes()[:4] == b"\x89PNG"
    panels = {place.get_title(): place for place in shown[0].axes}
    assert [label.get_text() for label in panels["even"].get_yticklabels()] == ["ours", "theirs"]
    assert [bar.get_width() for bar in panels["even"].patches] == [2.5, 0.0]
    assert [text.get_text() for text in panels["even"].texts] == ["2.5", "failed"]
    assert [text.get_text() for text in panels["skewed"].texts] == ["48.6 M", "12,346"]
