"""metrics.jsonl is read back line by line, and W&B may fail without the run."""

import json
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
        "loss": loss,
        "lr": 0.1,
        "grad_norm": 1.0,
        "tokens_per_s": 1.0,
        "mem_gib": 0,
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
    open_metrics(tmp_path, step=0).train(row(1, loss=None) | {"grad_norm": float("nan")}, [])

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    (line,) = (tmp_path / METRICS).read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)["grad_norm"] is None


def test_a_failing_wandb_costs_the_run_nothing(tmp_path, monkeypatch, caplog):
    def fail(**arguments):
        raise wandb.errors.CommError("no route to the server")

    monkeypatch.setattr(wandb, "init", fail)
    open_metrics(tmp_path, step=0, mode="online").train(row(1), [[1.0, 2.0]])
    assert "W&B is off for this run: no route to the server" in caplog.text
    assert [found["step"] for found in read_metrics(tmp_path / METRICS)] == [1]


def test_wandb_is_told_name_group_tags_configuration_and_where_to_go_on(tmp_path, monkeypatch):
    told = {}
    run = SimpleNamespace(define_metric=lambda *args, **kwargs: None)
    monkeypatch.setattr(wandb, "init", lambda **arguments: told.update(arguments) or run)
    config = load_config(["attention=full", "name=mine", "logging.wandb=offline", "logging.tags=[a]", "experiment=r1"])
    Metrics(config, tmp_path, 0, {**MANIFEST, "commit": "c0ffee"})
    assert (told["name"], told["group"], told["tags"]) == ("mine", "r1", ["full", "a"])
    assert (told["id"], told["resume"], told["mode"]) == ("abc", "allow", "offline")
    assert (told["config"]["commit"], told["config"]["model"]["width"]) == ("c0ffee", 384)
