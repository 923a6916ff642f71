"""When a run learnt to copy from its context, as the report tells it."""

import json
import re

import pytest
from folders import make_run

from nsa_train.cli import main
from nsa_train.compare.report import tokens_to_copying
from nsa_train.compare.runs import Run

STEP = 512 * 8  # tokens


@pytest.mark.parametrize(
    ("used", "at"),
    [
        ((-0.1, -0.1, 0.5), 4.5),
        ((-0.3, -0.3, 0.0), 4.5),
        ((0.0, 0.6, 0.6), 1.5),
        ((0.0, 0.9, 0.6), 1.0),
        ((0.1, -0.1, 0.5), 4.5),
        ((0.0, 0.05, 0.09), None),
        ((0.9, 0.5, 0.9), None),
    ],
)
def test_a_run_copies_when_half_of_the_use_of_the_context_has_come(tmp_path, used, at):
    runs = [make_run(tmp_path, arm, used=used) for arm in ("full", "nsa")]
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "comparison_tiny.json").read_text())["rows"]
    told = [row["tokens_to_copying"] for row in report if row["what"] == "run"]
    assert told == [at and pytest.approx(at * STEP)] * 2
    (line,) = re.findall(r"^\| nsa-0 .*$", (tmp_path / "out" / "comparison_tiny.md").read_text(), re.M)
    assert line.split(" | ")[8] == (f"{at * STEP:,.0f}" if at else "-")


def test_when_a_run_copies_is_told_by_what_all_its_validations_show(tmp_path):
    """Longer rows of a later stage show places of documents that the first ones did not, and other documents there."""
    run = make_run(tmp_path, "full", used=(0.0, 0.5, 0.5))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["by_position"]["512-1024"] = 1.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tokens_to_copying(Run.read(run)) == pytest.approx(1.5 * STEP)


def test_a_model_no_better_than_word_frequencies_copies_nothing(tmp_path):
    run = make_run(tmp_path, "full", used=(-0.1, -0.1, 0.5), summary={"unigram_entropy": 4.0})
    assert tokens_to_copying(Run.read(run)) is None


def test_a_run_that_goes_on_from_another_has_learnt_to_copy_there(tmp_path):
    make_run(tmp_path, "full")
    run = make_run(tmp_path, "full", 1, used=(0.0, 0.5, 0.5), overrides=[f"init_from={tmp_path / 'full-0'}"])
    assert tokens_to_copying(Run.read(run)) is None
