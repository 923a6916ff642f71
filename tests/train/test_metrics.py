"""metrics.jsonl is read back line by line, and W&B may fail without the run."""

import json
import sys
from types import SimpleNamespace

import pytest
import wandb

from nsa_train.config.load import load_config
from nsa_train.train.metrics import METRICS, Metrics, read_metrics

MANIFEST = {"wandb_id": "abc", "commit": None, "corpus": {"hash": "0" * 64}}


def row(step, loss=1.0):
    return {
        "step": step,
        "tokens": 8 * step,
        "by_source": {},
        "loss": loss,
        "lr": 0.1,
        "grad_norm": 1.0,
        "skipped": False,
        "spike": False,
        "tokens_per_s": 1.0,
        "mem_gib": 0,
        "dead_experts": [],
    }


def open_metrics(folder, step, mode="disabled"):
    return Metrics(load_config([f"logging.wandb={mode}", f"runs_dir={folder}"]), folder, step, MANIFEST)


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "\x00\x00\x00", '{"step": 3}\n{"st'])
def test_lines_behind_the_checkpoint_and_a_torn_one_are_dropped(torn, tmp_path):
    (tmp_path / METRICS).write_text("".join(json.dumps(row(step)) + "\n" for step in (1, 2)) + torn)
    metrics = open_metrics(tmp_path, step=2)
    metrics.train(row(3), [])
    metrics.close({"exit_code": 0})
    assert [found["step"] for found in read_metrics(tmp_path / METRICS)] == [1, 2, 3]


def test_a_run_without_a_checkpoint_starts_an_empty_file(tmp_path):
    (tmp_path / METRICS).write_text(json.dumps(row(0)) + "\n")
    open_metrics(tmp_path, step=0)
    assert (tmp_path / METRICS).read_text() == ""


def test_every_line_is_strict_json_also_without_a_finite_loss(tmp_path):
    metrics, nan = open_metrics(tmp_path, step=0), float("nan")
    metrics.train(row(1, loss=None) | {"grad_norm": nan}, [])
    metrics.validation(row(1, loss=nan) | {"by_position": {"0-64": nan}, "layers": [{"gates": {"cmp": nan}}]})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    train, val = (json.loads(x, parse_constant=refuse) for x in (tmp_path / METRICS).read_text().splitlines())
    assert (train["grad_norm"], val["loss"], val["by_position"]) == (None, None, {"0-64": None})
    assert val["layers"] == [{"gates": {"cmp": None}}]


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"3", b'{"tokens": 1}', b'{"step": 2, "to'])
def test_a_damaged_line_costs_no_other_line(damage, tmp_path):
    lines = [json.dumps(row(1)).encode(), damage, json.dumps(row(3)).encode()]
    (tmp_path / METRICS).write_bytes(b"\n".join(lines) + b"\n")
    assert [found["step"] for found in read_metrics(tmp_path / METRICS)] == [1, 3]


def test_a_failing_wandb_costs_the_run_nothing(tmp_path, monkeypatch, caplog):
    def fail(**arguments):
        raise wandb.errors.CommError("no route to the server")

    monkeypatch.setattr(wandb, "init", fail)
    open_metrics(tmp_path, step=0, mode="online").train(row(1) | {"dead_experts": [0]}, [[1.0, 2.0]])
    assert "W&B is off from here on" in caplog.text
    assert "no route to the server" in caplog.text
    assert [found["step"] for found in read_metrics(tmp_path / METRICS)] == [1]


def test_a_missing_wandb_costs_the_run_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    open_metrics(tmp_path, step=0, mode="offline").train(row(1) | {"dead_experts": [0]}, [[1.0, 2.0]])
    assert "W&B is off from here on" in caplog.text
    assert [found["step"] for found in read_metrics(tmp_path / METRICS)] == [1]


@pytest.mark.parametrize("failing", ["log", "finish"])
def test_a_wandb_that_fails_later_costs_the_run_nothing(failing, tmp_path, monkeypatch, caplog):
    def fail(*arguments, **named):
        raise BrokenPipeError("its process is gone")

    def work(*arguments, **named):
        return None

    run = SimpleNamespace(define_metric=work, log=work, finish=work, summary={})
    setattr(run, failing, fail)
    monkeypatch.setattr(wandb, "init", lambda **arguments: run)
    metrics = open_metrics(tmp_path, step=0, mode="offline")
    for step in (1, 2):
        metrics.train(row(step) | {"dead_experts": [0]}, [[1.0, 2.0]])
    metrics.close({"exit_code": 0})
    assert caplog.text.count("its process is gone") == 1
    assert [found["step"] for found in read_metrics(tmp_path / METRICS)] == [1, 2]


def test_wandb_is_told_name_group_tags_configuration_and_where_to_go_on(tmp_path, monkeypatch):
    told = {}
    run = SimpleNamespace(define_metric=lambda *args, **kwargs: None)
    monkeypatch.setattr(wandb, "init", lambda **arguments: told.update(arguments) or run)
    config = load_config(["attention=full", "name=mine", "logging.wandb=offline", "logging.tags=[a]", "experiment=r1"])
    Metrics(config, tmp_path, 0, {**MANIFEST, "commit": "c0ffee"})
    assert (told["name"], told["group"], told["tags"]) == ("mine", "r1", ["full", "a"])
    assert (told["id"], told["resume"], told["mode"]) == ("abc", "allow", "offline")
    assert (told["config"]["commit"], told["config"]["model"]["width"]) == ("c0ffee", 384)


def test_wandb_gets_the_load_of_experts_by_the_layer_of_the_model(tmp_path, monkeypatch):
    told = {}
    run = SimpleNamespace(define_metric=lambda *args, **kwargs: None, log=lambda values, step: told.update(values))
    monkeypatch.setattr(wandb, "init", lambda **arguments: run)
    config = load_config(["logging.wandb=offline", f"runs_dir={tmp_path}", "model.layers=4", "model.dense_layers=2"])
    metrics = Metrics(config, tmp_path, 0, MANIFEST)
    metrics.train(row(1) | {"dead_experts": [0, 1]}, [[2.0, 3.0, 1.0], [0.0, 9.0, 0.0]])
    experts = {key.removeprefix("experts/"): told[key] for key in told if key.startswith("experts/")}
    assert experts.pop("layer_2").histogram == [2.0, 3.0, 1.0]
    assert experts.pop("layer_3").histogram == [0.0, 9.0, 0.0]
    assert experts == {"layer_2_peak": 1.5, "layer_2_dead": 0, "layer_3_peak": 3.0, "layer_3_dead": 1}
    assert "train/dead_experts" not in told
