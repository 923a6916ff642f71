"""The training benchmark: what it recomputes, and that a row of any age leads back to its configuration."""

import json

import pytest
import torch

from nsa_train.bench import training
from nsa_train.bench.results import with_earlier
from nsa_train.config.load import load_config
from nsa_train.plan.speed import GPUS

OLD = {"preset": "m", "attention": "nsa", "T": 65536, "gpus": 1, "zero": 2, "micro_batch": 1, "batch_rows": 2,
       "checkpointing": True, "overrides": []}  # fmt: skip


@pytest.fixture
def on_an_h100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPUS["h100"].name)


@pytest.mark.usefixtures("on_an_h100")
@pytest.mark.parametrize(
    ("preset", "T", "rest", "parts"),
    [
        ("m", 8192, [], ()),
        ("m", 8192, ["trainer.micro_rows=4"], ("mlp",)),
        ("m", 8192, ["trainer.micro_rows=6"], ("attention",)),
        ("m", 65536, [], ("attention", "mlp")),
        ("m", 65536, ["model.layers=60"], ("attention", "mlp")),  # that nothing makes fit
    ],
)
def test_what_is_recomputed_is_the_cheapest_choice_that_fits(preset, T, rest, parts):
    trainer = load_config(training.overrides_of(preset, "nsa", T, 45, 1, rest)).trainer
    assert trainer.computed_again == parts


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (OLD, ("attention", "mlp")),
        (OLD | {"checkpointing": False}, ()),
        (OLD | {"recomputed": ["mlp"]}, ("mlp",)),
        (OLD | {"checkpointing": False, "recomputed": []}, ()),
    ],
)
def test_a_row_of_any_age_leads_back_to_its_configuration(row, parts):
    assert load_config(training.settings_of(row)).trainer.computed_again == parts


def test_a_row_takes_the_place_of_an_earlier_one_of_the_same_run(tmp_path):
    path = tmp_path / "training_h100.json"
    others = [OLD | {"checkpointing": False}, OLD | {"recomputed": ["mlp"]}, OLD | {"overrides": ["model.layers=4"]}]
    path.write_text(json.dumps({"rows": [OLD, *others]}))
    both = OLD | {"recomputed": ["attention", "mlp"], "overrides": ["data.corpus=elsewhere"]}
    assert with_earlier(path, [both], training.key_of) == [*others, both]
