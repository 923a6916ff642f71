"""What the figure of a comparison draws."""

import pytest
from folders import WEIGHTS, make_run

from nsa_train.cli import main

STEP = 512 * 8  # tokens


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Axes [2, 4] of a comparison of `full` and `nsa`, by what their runs' manifests and summaries say."""

    def of(manifest=(), summary=(), overrides=()):
        about = {"manifest": manifest, "summary": summary, "overrides": overrides}
        runs = [make_run(tmp_path, arm, seed, used=(0.0, 0.0, used), **about)
                for arm, used in (("full", 0.5), ("nsa", 1.0)) for seed in (0, 1)]  # fmt: skip
        figures = []
        monkeypatch.setattr("nsa_train.compare.figure.save_figure", lambda figure, path: figures.append(figure))
        assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
        (figure,) = figures
        places = figure.axes
        return places[:4], places[4:]

    return of


def losses(place, seed):
    """Of the two arms' lines of a seed."""
    lines = [line.get_ydata() for line in place.lines if len(line.get_xdata()) == 3]
    return lines[seed], lines[2 + seed]


def test_seconds_of_runs_that_were_alone_are_drawn(drawn):
    above, _ = drawn()
    assert [len(place.lines) for place in above] == [4, 4, 4, 3]
    assert not above[2].texts


def test_where_no_run_was_alone_the_place_of_seconds_says_so(drawn):
    above, _ = drawn(manifest={"runs_a_device": 2})
    assert [len(place.lines) for place in above] == [4, 4, 0, 3]
    assert above[2].texts[0].get_text() == "no run was alone on its device,\nand no speed was measured apart"


def test_a_seed_has_its_line_and_arms_of_few_seeds_hollow_marks_without_intervals(drawn):
    (tokens, *_), (positions, *_) = drawn()
    full, nsa = ([line.get_linestyle() for line in tokens.lines[at : at + 2]] for at in (0, 2))
    assert full == nsa == ["-", "--"]
    (marks,) = (line for line in positions.lines if line.get_marker() == "o")
    assert marks.get_markerfacecolor() == "white"
    assert not [bar for bar in positions.collections if len(bar.get_segments()[0])]


def test_leads_are_differences_of_the_curves_of_a_seed(drawn):
    (tokens, _, _, leads), _ = drawn()
    for seed, line in enumerate(leads.lines[:2]):
        full, nsa = losses(tokens, seed)
        assert list(line.get_xdata()) == [3 * STEP, 6 * STEP]
        assert list(line.get_ydata()) == pytest.approx(list((nsa - full)[1:]))


def test_runs_that_go_on_from_others_are_drawn_from_their_start(drawn, tmp_path):
    read = {"rows_fingerprint": "rows of before", "rows_sample_sha256": "x"}
    origin = {"folder": "before", "step": 6, "initial_weights_sha256": WEIGHTS, "origin": None, **read}
    before = [f"init_from={tmp_path / 'before'}"]
    (tokens, *_, leads), (*_, copying) = drawn(manifest={"origin": origin}, overrides=before)
    assert list(leads.lines[0].get_xdata()) == [0, 3 * STEP, 6 * STEP]
    assert tokens.get_ylim()[1] > max(line.get_ydata()[0] for line in tokens.lines[:4])
    assert copying.texts[0].get_text() == "no run learnt to copy after its start"
    assert not copying.get_xticks().size


def test_last_losses_are_drawn_over_when_runs_learnt_to_copy(drawn):
    _, (*_, ends, copying) = drawn()
    assert len(copying.lines) == 4
    assert [dot.get_xdata()[0] for dot in copying.lines] == pytest.approx([4.5 * STEP] * 4)
    assert [dot.get_ydata()[0] for dot in copying.lines] == [dot.get_ydata()[0] for dot in ends.lines]


@pytest.mark.parametrize(("entropy", "shown"), [(5.9, True), (50.0, False)])
def test_the_entropy_of_single_tokens_is_drawn_where_it_does_not_flatten_the_curves(drawn, entropy, shown):
    above, _ = drawn(summary={"unigram_entropy": entropy})
    assert [len(place.lines) for place in above[:3]] == [4 + shown] * 3
