"""What the report says all runs share."""

import json

import pytest
from folders import ORIGIN, compared, make_run

from nsa_train.compare.gates import recipe
from nsa_train.config.load import load_config

STAGES = ["stages=long_64k", "stages.parts.short.tokens=8192", "trainer.seq_len=8192", "trainer.batch_rows=8"]


@pytest.mark.parametrize(
    ("overrides", "lengths", "said"), [([], [512], "512"), (STAGES, [8192, 65536], "8,192, then 65,536")]
)
def test_the_report_says_how_long_the_rows_of_each_stage_are(tmp_path, overrides, lengths, said):
    runs = [make_run(tmp_path, arm, overrides=overrides) for arm in ("full", "nsa")]
    (head, *_), report = compared(tmp_path / "out", runs)
    assert head["row_tokens"] == lengths
    assert f" tokens in rows of {said}, " in report


def test_runs_that_go_on_from_others_reach_no_level(tmp_path):
    runs = [
        make_run(tmp_path, arm, manifest={"origin": ORIGIN}, overrides=["init_from=before"]) for arm in ("full", "nsa")
    ]
    (head, *rows), said = compared(tmp_path / "out", runs)
    assert (head["level"], head["steps_before"]) == (None, [6])
    assert not {"level", "secondary"} & {row["what"] for row in rows}
    assert "**a stage that goes on from other runs, which are what levels are about**" in said
    assert "## Level" not in said


def test_gates_of_the_compared_arms_alone_stand_in_the_report(tmp_path):
    runs = [make_run(tmp_path, arm) for arm in ("full", "nsa")]
    gate = {"experiment": "tiny", "gate": "future", "found": "0", "demanded": "0", "device": "CPU", "commit": "a" * 40}
    gates = [{**gate, "arm": arm, "recipe": recipe(load_config([f"attention={arm}"])), "passed": arm != "window"}
             for arm in ("full", "nsa", "window")]  # fmt: skip
    (tmp_path / "gates.json").write_text(json.dumps({"schema": "nsa-train/gates/1", "rows": gates}))
    (head, *rows), said = compared(tmp_path / "out", runs, "--gates", tmp_path / "gates.json")
    assert head["level"] is not None
    assert [row["arm"] for row in rows if row["what"] == "gate"] == ["full", "nsa"]
    assert "| `nsa` | future | yes | 0 | 0 | CPU | aaaaaaaaaaaa |" in said


def test_seeds_that_were_asked_and_leads_between_far_validations_are_told(tmp_path):
    runs = [make_run(tmp_path, arm, seed) for seed in (0, 1) for arm in ("full", "nsa")]
    for run in runs:  # validations at the start and at the end only
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        kept = [row for row in rows if row["split"] == "train" or row["step"] != 3]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    asked = [{"what": "summary", "task": "heldout", "length": 512, "loss": 5.0, "settings": {"corpus_hash": "c" * 64}}]
    (runs[1] / "eval").mkdir()
    (runs[1] / "eval" / "heldout.json").write_text(json.dumps({"rows": asked}))
    rows, report = compared(tmp_path / "out", runs)
    assert "Seeds that were asked: `nsa` 0." in report
    leads = [row["difference"] for row in rows if row["what"] == "lead"]
    assert [one[:4] for one in leads] == [[None] * 4] * 2
    assert "| nsa - full | 1 | - | - | - | - | " in report
