"""Runs that shared a device take their seconds from a benchmark of the same recipe on the same device, or from none."""

import json

import pytest
from folders import make_run

from nsa_train.cli import main
from nsa_train.compare.runs import Run
from nsa_train.compare.speeds import Speeds

ROW = {"preset": "tiny", "attention": "nsa", "T": 512, "gpus": 1, "zero": 2, "micro_batch": 4, "batch_rows": 8,
       "checkpointing": False, "recomputed": [], "overrides": [], "tokens_per_s": 100.0}  # fmt: skip
SHARED = {"device": "NVIDIA H200", "runs_a_device": 3}


def speeds(path, *rows, device="NVIDIA H200"):
    head = {"schema": "nsa-train/training/1", "device": {"name": device, "count": 1}}
    (path / "training.json").write_text(json.dumps({**head, "rows": [{**ROW, **row} for row in rows]}))
    return path / "training.json"


def compared(out, runs, *words):
    assert main(["compare", *map(str, runs), *map(str, words), "--out", str(out)]) == 0
    rows = json.loads((out / "comparison_tiny.json").read_text())["rows"]
    return {row["name"]: row for row in rows if row["what"] == "run"}, rows, (out / "comparison_tiny.md").read_text()


def test_seconds_of_shared_runs_are_by_the_speed_alone(tmp_path):
    shared = [make_run(tmp_path, arm, seed, manifest=SHARED) for arm in ("full", "nsa") for seed in (0, 1)]
    alone = [make_run(tmp_path, arm, 2, manifest={"device": "NVIDIA H200"}) for arm in ("full", "nsa")]
    failed = {"attention": "full", "error": "out of memory"}
    file = speeds(tmp_path, {}, {"tokens_per_s": 200.0, "overrides": ["trainer.cuda_graphs=true"]}, failed)
    found, rows, said = compared(tmp_path / "out", [*shared, *alone], "--speeds", file)
    tokens = 6 * 512 * 8
    assert found["nsa-0"]["seconds"] == found["nsa-1"]["seconds"] == tokens / 200
    assert [point["seconds"] for point in found["nsa-0"]["val"]] == [0, tokens / 400, tokens / 200]
    own = found["nsa-2"]["alone_tokens_per_s"]
    assert own == found["nsa-2"]["tokens_per_s"] != 200
    assert {row["arm"]: row["tokens_per_s"] for row in rows if row["what"] == "arm"} == {
        "full": own, "nsa": pytest.approx((200 + 200 + own) / 3)
    }  # fmt: skip
    assert "by the speed of a short run alone (training.json): nsa-0, nsa-1.\n" in said
    assert "so that their seconds tell nothing: full-0, full-1.\n" in said
    assert said.count("| shared | shared |") == 2


@pytest.mark.parametrize(
    "other",
    [
        {"preset": "r1"}, {"attention": "nsa_random"}, {"gpus": 2}, {"T": 256, "batch_rows": 16},
        {"batch_rows": 4}, {"micro_batch": 8}, {"checkpointing": True, "recomputed": ["mlp"]},
        {"overrides": ["model.layers=3"]}, {"overrides": ["data=stdlib_recall"]}, {"overrides": ["parallel=zero1"]},
    ],
)  # fmt: skip
def test_a_speed_of_another_recipe_is_not_taken(other, tmp_path):
    run = Run.read(make_run(tmp_path, "nsa", manifest=SHARED))
    file = speeds(tmp_path, {})
    assert Speeds.read(file).of(run) == 100
    assert Speeds.read(speeds(tmp_path, other)).of(run) is None


def test_a_speed_of_another_device_is_not_taken(tmp_path):
    run = Run.read(make_run(tmp_path, "nsa", manifest=SHARED))
    assert Speeds.read(speeds(tmp_path, {}, device="NVIDIA H100 80GB HBM3")).of(run) is None


@pytest.mark.parametrize("content", ["", "{}", '{"schema": "nsa-train/moe/1", "rows": []}'])
def test_a_file_without_speeds_is_refused(content, tmp_path, capsys):
    runs = [str(make_run(tmp_path, arm)) for arm in ("full", "nsa")]
    (tmp_path / "wrong.json").write_text(content)
    assert main(["compare", *runs, "--speeds", str(tmp_path / "wrong.json"), "--out", str(tmp_path / "out")]) == 2
    assert "wrong.json: no result of `nsa-train bench training`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_row_that_no_configuration_of_today_has_is_not_taken(tmp_path):
    run = Run.read(make_run(tmp_path, "nsa", manifest=SHARED))
    assert Speeds.read(speeds(tmp_path, {"overrides": ["trainer.gone=1"]}, {})).of(run) == 100
