"""What the figure of a comparison draws."""

import pytest
from folders import ORIGIN, make_run

from nsa_train.cli import main
from nsa_train.compare.figure import KNOWN
from nsa_train.config.load import options

STEP = 512 * 8  # tokens


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Axes [3, 3] of a comparison of `full` and `nsa`, by what their runs' manifests and summaries say."""

    def of(manifest=(), summary=(), overrides=(), seeds=(0, 1)):
        about = {"manifest": manifest, "summary": summary, "overrides": overrides}
        runs = [make_run(tmp_path, arm, seed, used=(0.0, 0.0, used), **about)
                for arm, used in (("full", 0.5), ("nsa", 1.0)) for seed in seeds]  # fmt: skip
        figures = []
        monkeypatch.setattr("nsa_train.compare.figure.save_figure", lambda figure, path: figures.append(figure))
        assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
        (figure,) = figures
        return [figure.axes[i : i + 3] for i in (0, 3, 6)]

    return of


def losses(place, seed):
    """Of the two arms' lines of a seed."""
    lines = [line.get_ydata() for line in place.lines if len(line.get_xdata()) == 3]
    return lines[seed], lines[2 + seed]


def test_seconds_of_runs_that_were_alone_are_drawn(drawn):
    losses, (leads, last, _), _ = drawn()
    assert [len(place.lines) for place in (*losses, leads, last)] == [6, 4, 4, 3, 3]  # with a legend of seeds
    assert not losses[2].texts


def test_where_no_run_was_alone_the_place_of_seconds_says_so(drawn):
    (_, flops, seconds), _, _ = drawn(manifest={"runs_a_device": 2})
    assert (len(flops.lines), len(seconds.lines)) == (4, 0)
    assert seconds.texts[0].get_text() == "no run was alone on its device,\nand no speed was measured apart"


@pytest.mark.parametrize(("seeds", "hollow"), [((0, 1), True), ((0, 1, 2), False)])
def test_a_seed_has_its_looks_and_few_seeds_have_hollow_marks_and_no_interval(seeds, hollow, drawn):
    (tokens, *_), (*_, ends), (positions, *_) = drawn(seeds=seeds)
    lines = ["-", "--", ":"][: len(seeds)]
    assert [line.get_linestyle() for line in tokens.lines] == lines * 3  # of full, of nsa, of the legend
    assert [dot.get_marker() for dot in ends.lines] == ["o", "s", "^"][: len(seeds)] * 2
    told = [text.get_text() for text in tokens.get_legend().get_texts()]
    assert told == ["full", "nsa", *(f"seed {seed}" for seed in seeds)]
    (marks,) = (line for line in positions.lines if line.get_marker() == "o")
    assert (marks.get_markerfacecolor() == "white") is hollow
    assert any(len(bar.get_segments()[0]) for bar in positions.collections) is not hollow
    assert ("95% interval" in positions.get_title()) is not hollow


def test_leads_are_differences_of_the_curves_of_a_seed(drawn):
    (tokens, *_), (leads, last, _), _ = drawn()
    for seed, line in enumerate(leads.lines[:2]):
        full, nsa = losses(tokens, seed)
        assert list(line.get_xdata()) == [3 * STEP, 6 * STEP]
        assert list(line.get_ydata()) == pytest.approx(list((nsa - full)[1:]))
        assert list(last.lines[seed].get_xdata()) == [6 * STEP]


def test_runs_that_go_on_from_others_are_drawn_from_their_start(drawn, tmp_path):
    before = [f"init_from={tmp_path / 'before'}"]
    (tokens, *_), (leads, last, _), (*_, copying) = drawn(manifest={"origin": ORIGIN}, overrides=before)
    assert list(leads.lines[0].get_xdata()) == [0, 3 * STEP, 6 * STEP]
    assert not last.axison  # it would show the same
    assert tokens.get_ylim()[1] > max(line.get_ydata()[0] for line in tokens.lines[:4])
    assert copying.texts[0].get_text() == "no run learnt to copy after its start"
    assert not copying.get_xticks().size


def test_last_losses_are_drawn_over_when_runs_learnt_to_copy(drawn):
    _, (*_, ends), (*_, copying) = drawn()
    assert len(copying.lines) == 4
    assert [dot.get_xdata()[0] for dot in copying.lines] == pytest.approx([4.5 * STEP] * 4)
    assert [dot.get_ydata()[0] for dot in copying.lines] == [dot.get_ydata()[0] for dot in ends.lines]


@pytest.mark.parametrize(("entropy", "shown"), [(5.9, True), (50.0, False)])
def test_the_entropy_of_single_tokens_is_drawn_where_it_does_not_flatten_the_curves(drawn, entropy, shown):
    (tokens, flops, seconds), _, _ = drawn(summary={"unigram_entropy": entropy})
    assert [len(place.lines) for place in (tokens, flops, seconds)] == [6 + shown, 4 + shown, 4 + shown]


def test_an_arm_has_its_colour_whatever_stands_beside_it(drawn):
    (tokens, *_), (*_, ends), _ = drawn(seeds=(0,))
    assert [line.get_color() for line in tokens.lines[:2]] == ["C0", "C2"]  # between them full_gated, which is absent
    assert [dot.get_color() for dot in ends.lines] == ["C0", "C2"]


def test_every_arm_has_a_colour_of_its_own():
    assert sorted(KNOWN) == options("attention")
    assert len(KNOWN) <= 10  # colours there are
