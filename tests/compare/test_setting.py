"""What the report says all runs share."""

import json

import pytest
from folders import make_run

from nsa_train.cli import main

STAGES = ["stages=long_64k", "stages.parts.short.tokens=8192", "trainer.seq_len=8192", "trainer.batch_rows=8"]


@pytest.mark.parametrize(
    ("overrides", "lengths", "said"), [([], [512], "512"), (STAGES, [8192, 65536], "8,192, then 65,536")]
)
def test_the_report_says_how_long_the_rows_of_each_stage_are(tmp_path, overrides, lengths, said):
    runs = [make_run(tmp_path, arm, overrides=overrides) for arm in ("full", "nsa")]
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    head, *_ = json.loads((tmp_path / "out" / "comparison_tiny.json").read_text())["rows"]
    assert head["row_tokens"] == lengths
    assert f" tokens in rows of {said}, " in (tmp_path / "out" / "comparison_tiny.md").read_text()
