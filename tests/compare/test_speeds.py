"""Runs that shared a device take their seconds from a benchmark of the same recipe on the same device, or from none."""

import json

import pytest
from folders import compared, make_run

from nsa_train.cli import main
from nsa_train.compare.runs import Run
from nsa_train.compare.speeds import Speeds
from nsa_train.errors import NsaTrainError

ROW = {"preset": "tiny", "attention": "nsa", "T": 512, "gpus": 1, "micro_batch": 4, "batch_rows": 8,
       "checkpointing": False, "recomputed": [], "overrides": [],
       "tokens_per_s": 100.0, "cuda_graphs": False}  # fmt: skip
SHARED = {"device": "NVIDIA H200", "runs_a_device": 3}
TOKENS = 6 * 512 * 8  # of a run


def speeds(path, *rows, device="NVIDIA H200"):
    head = {"schema": "nsa-train/training/1", "device": {"name": device, "count": 1}}
    (path / "training.json").write_text(json.dumps({**head, "rows": [{**ROW, **row} for row in rows]}))
    return path / "training.json"


def taken(path, run):
    """Tokens per second."""
    return Speeds.read(path, [run]).of(run).tokens_per_s


def refused(path, run):
    with pytest.raises(NsaTrainError, match="has the speed of none of these runs"):
        Speeds.read(path, [run])
    return True


def test_seconds_of_shared_runs_are_by_the_speed_alone(tmp_path):
    shared = [make_run(tmp_path, arm, seed, manifest=SHARED) for arm in ("full", "nsa") for seed in (0, 1)]
    alone = [make_run(tmp_path, arm, 2, manifest={"device": "NVIDIA H200"}) for arm in ("full", "nsa")]
    fastest = {"tokens_per_s": 200.0, "overrides": ["trainer.cuda_graphs=true"], "cuda_graphs": True}
    file = speeds(tmp_path, {}, fastest, {"attention": "full_gated"})
    rows, said = compared(tmp_path / "out", [*shared, *alone], "--speeds", file)
    runs = {row["name"]: row for row in rows if row["what"] == "run"}
    assert runs["nsa-0"]["seconds"] == runs["nsa-1"]["seconds"] == TOKENS / 200
    assert [point["seconds"] for point in runs["nsa-0"]["val"]] == [0, TOKENS / 400, TOKENS / 200]
    own = runs["nsa-2"]["alone_tokens_per_s"]
    assert own == runs["nsa-2"]["tokens_per_s"] != 200
    of_arms = {row["arm"]: row["tokens_per_s"] for row in rows if row["what"] == "arm"}
    assert of_arms == {"full": own, "nsa": pytest.approx((200 + 200 + own) / 3)}
    assert "a short run alone, which replayed CUDA graphs (training.json): nsa-0, nsa-1.\n" in said
    assert "so that their seconds tell nothing: full-0, full-1.\n" in said
    assert "Not all runs replayed CUDA graphs" in said
    assert said.count("| shared | shared |") == 2


@pytest.mark.parametrize(
    "other",
    [
        {"preset": "r1"}, {"attention": "nsa_random"}, {"gpus": 2}, {"T": 256, "batch_rows": 16}, {"batch_rows": 4},
        {"micro_batch": 8}, {"checkpointing": True, "recomputed": ["mlp"]}, {"overrides": ["model.layers=3"]},
        {"overrides": ["data=stdlib_recall"]}, {"overrides": ["parallel=zero1"]},
        {"overrides": ["parallel.offload_optimizer=cpu"]}, {"overrides": ["trainer.gone=1"]},
    ],
)  # fmt: skip
def test_a_speed_of_another_recipe_is_not_taken(other, tmp_path):
    run = Run.read(make_run(tmp_path, "nsa", manifest=SHARED))
    assert taken(speeds(tmp_path, {}), run) == 100
    assert refused(speeds(tmp_path, other), run)


@pytest.mark.parametrize(
    ("overrides", "manifest", "row"),
    [
        (["trainer.micro_rows=64"], {}, {"micro_batch": 8}),
        ([], {"world_size": 4}, {"gpus": 4, "micro_batch": 2}),
        (["optim.lr=1e-3", "trainer.val_every=2", "schedule.warmup_share=0.3"], {}, {}),
        (["init_from=/before"], {"origin": {"folder": "before", "step": 6}}, {}),
    ],
)
def test_what_leaves_the_speed_as_it_is_may_differ(overrides, manifest, row, tmp_path):
    run = Run.read(make_run(tmp_path, "nsa", overrides=overrides, manifest=SHARED | manifest))
    assert taken(speeds(tmp_path, row), run) == 100


@pytest.mark.parametrize(
    ("overrides", "manifest"),
    [
        ([], {"device": "NVIDIA H100 80GB HBM3", "runs_a_device": 2}), ([], {"device": "NVIDIA H200"}),
        (["stages=long_64k", "stages.parts.short.tokens=8192", "trainer.seq_len=8192", "trainer.batch_rows=8"], SHARED),
    ],
)  # fmt: skip
def test_runs_alone_on_other_devices_or_in_stages_take_none(overrides, manifest, tmp_path):
    run = Run.read(make_run(tmp_path, "nsa", overrides=overrides, manifest=manifest))
    stages = {"overrides": overrides, "T": 8192} if overrides else {}
    assert refused(speeds(tmp_path, stages), run)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no result of `nsa-train bench training`"),
        ("{}", "no result of `nsa-train bench training`"),
        ('{"schema": "nsa-train/moe/1", "rows": []}', "its schema is nsa-train/moe/1"),
        ('{"schema": "nsa-train/training/1", "device": {"name": "CPU"}, "rows": [{"T": 512}]}', "speed of none"),
    ],
)  # fmt: skip
def test_a_file_without_speeds_of_these_runs_is_refused(content, said, tmp_path, capsys):
    runs = [str(make_run(tmp_path, arm, manifest={"runs_a_device": 2})) for arm in ("full", "nsa")]
    (tmp_path / "wrong.json").write_text(content)
    assert main(["compare", *runs, "--speeds", str(tmp_path / "wrong.json"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "wrong.json: " in error
    assert said in error
    assert not (tmp_path / "out").exists()
