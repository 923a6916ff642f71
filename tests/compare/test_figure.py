"""What the figure of a comparison draws."""

import pytest
from folders import ORIGIN, make_run

from nsa_train.cli import main

STEP = 512 * 8  # tokens


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Axes [2, 5] of a comparison of `full` and `nsa`, by what their runs' manifests and summaries say."""

    def of(manifest=(), summary=(), overrides=(), seeds=(0, 1)):
        about = {"manifest": manifest, "summary": summary, "overrides": overrides}
        runs = [make_run(tmp_path, arm, seed, used=(0.0, 0.0, used), **about)
                for arm, used in (("full", 0.5), ("nsa", 1.0)) for seed in seeds]  # fmt: skip
        figures = []
        monkeypatch.setattr("nsa_train.compare.figure.save_figure", lambda figure, path: figures.append(figure))
        assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
        (figure,) = figures
        places = figure.axes
        return places[:5], places[5:]

    return of


def losses(place, seed):
    """Of the two arms' lines of a seed."""
    lines = [line.get_ydata() for line in place.lines if len(line.get_xdata()) == 3]
    return lines[seed], lines[2 + seed]


def test_seconds_of_runs_that_were_alone_are_drawn(drawn):
    above, _ = drawn()
    assert [len(place.lines) for place in above] == [4, 4, 4, 3, 3]
    assert not above[2].texts


def test_where_no_run_was_alone_the_place_of_seconds_says_so(drawn):
    above, _ = drawn(manifest={"runs_a_device": 2})
    assert [len(place.lines) for place in above] == [4, 4, 0, 3, 3]
    assert above[2].texts[0].get_text() == "no run was alone on its device,\nand no speed was measured apart"


@pytest.mark.parametrize(("seeds", "hollow"), [((0, 1), True), ((0, 1, 2), False)])
def test_a_seed_has_its_looks_and_few_seeds_have_hollow_marks_and_no_interval(seeds, hollow, drawn):
    (tokens, *_), (positions, _, ends, _, legend) = drawn(seeds=seeds)
    lines = ["-", "--", ":"][: len(seeds)]
    assert [line.get_linestyle() for line in tokens.lines] == lines * 2
    assert [dot.get_marker() for dot in ends.lines] == ["o", "s", "^"][: len(seeds)] * 2
    assert [text.get_text() for text in legend.get_legend().get_texts()] == [f"seed {seed}" for seed in seeds]
    (marks,) = (line for line in positions.lines if line.get_marker() == "o")
    assert (marks.get_markerfacecolor() == "white") is hollow
    assert any(len(bar.get_segments()[0]) for bar in positions.collections) is not hollow
    assert ("95% interval" in positions.get_ylabel()) is not hollow


def test_leads_are_differences_of_the_curves_of_a_seed(drawn):
    (tokens, _, _, leads, last), _ = drawn()
    for seed, line in enumerate(leads.lines[:2]):
        full, nsa = losses(tokens, seed)
        assert list(line.get_xdata()) == [3 * STEP, 6 * STEP]
        assert list(line.get_ydata()) == pytest.approx(list((nsa - full)[1:]))
        assert list(last.lines[seed].get_xdata()) == [6 * STEP]


def test_runs_that_go_on_from_others_are_drawn_from_their_start(drawn, tmp_path):
    before = [f"init_from={tmp_path / 'before'}"]
    (tokens, *_, leads), (*_, copying, _) = drawn(manifest={"origin": ORIGIN}, overrides=before)
    assert list(leads.lines[0].get_xdata()) == [0, 3 * STEP, 6 * STEP]
    assert tokens.get_ylim()[1] > max(line.get_ydata()[0] for line in tokens.lines[:4])
    assert copying.texts[0].get_text() == "no run learnt to copy after its start"
    assert not copying.get_xticks().size


def test_last_losses_are_drawn_over_when_runs_learnt_to_copy(drawn):
    _, (*_, ends, copying, _) = drawn()
    assert len(copying.lines) == 4
    assert [dot.get_xdata()[0] for dot in copying.lines] == pytest.approx([4.5 * STEP] * 4)
    assert [dot.get_ydata()[0] for dot in copying.lines] == [dot.get_ydata()[0] for dot in ends.lines]


@pytest.mark.parametrize(("entropy", "shown"), [(5.9, True), (50.0, False)])
def test_the_entropy_of_single_tokens_is_drawn_where_it_does_not_flatten_the_curves(drawn, entropy, shown):
    above, _ = drawn(summary={"unigram_entropy": entropy})
    assert [len(place.lines) for place in above[:3]] == [4 + shown] * 3
