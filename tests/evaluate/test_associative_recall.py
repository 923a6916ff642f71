"""The script that asks whether an arm learns to find facts: its documents, what needs selection, and what it writes."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import load_script

from nsa_train.config.load import load_config
from nsa_train.data.loader import NO_LABEL
from nsa_train.model.branches import spec_of
from nsa_train.ops.fixed_blocks import fixed_blocks

FACTS = 8


@pytest.fixture
def script(monkeypatch):
    return load_script("associative_recall", monkeypatch)


@pytest.fixture
def config(script):
    return load_config([*script.SMALL, "attention=nsa"])


def test_every_question_has_its_fact_before_it(script, config):
    tokens, labels, fact = script.documents(config, script.Task(FACTS, 40), 0)
    row, place = (labels != NO_LABEL).nonzero(as_tuple=True)
    assert len(row) == FACTS * config.trainer.batch_rows
    at = fact[row, place]
    assert (at >= 0).all()
    assert (at < place).all()
    assert (fact[labels == NO_LABEL] == -1).all()
    assert torch.equal(tokens[row, at], tokens[row, place])
    assert torch.equal(tokens[row, at + 1], labels[row, place])
    assert torch.equal(tokens[row, place + 1], labels[row, place])
    for one in range(len(tokens)):
        assert len(tokens[one][fact[one] >= 0].unique()) == FACTS
    assert not torch.equal(tokens, script.documents(config, script.Task(FACTS, 40), 1).tokens)


def test_selection_is_needed_where_neither_forced_blocks_nor_the_window_hold_the_fact(script, config):
    spec, T = spec_of(config.attention), config.trainer.seq_len
    _, _, fact = script.documents(config, script.Task(FACTS, 40), 0)
    needs, _ = script.selected(config, fact)
    forced = fixed_blocks(torch.arange(T), 1, spec, None)[:, 0]
    for row, place in (fact >= 0).nonzero().tolist():
        at = int(fact[row, place])
        hidden = at // spec.slc_block not in forced[place].tolist() and place - at >= spec.window
        assert bool(needs[row, place]) == hidden
    assert 0 < needs.sum() < (fact >= 0).sum()


def test_the_chance_is_that_of_blocks_drawn_at_random(script, config):
    spec, T = spec_of(config.attention), config.trainer.seq_len
    _, _, fact = script.documents(config, script.Task(FACTS, 40), 0)
    needs, chance = script.selected(config, fact)
    row, place = needs.nonzero(as_tuple=True)
    block = fact[row, place] // spec.slc_block
    draws = [fixed_blocks(torch.arange(T), 1, spec, torch.tensor(seed))[:, 0] for seed in range(300)]
    held = torch.stack([(drawn[place] == block[:, None]).any(-1) for drawn in draws]).double().mean()
    assert float(held) == pytest.approx(float(chance[needs].mean()), abs=0.01)


def test_arms_add_up_in_one_file(script, tmp_path):
    def told(*arms):  # in a process of its own, which DeepSpeed wants for each engine's start
        words = ["--arms", *arms, "--every", "1", "--out", str(tmp_path), "--set", "trainer.steps=2"]
        subprocess.run([sys.executable, script.__file__, *words], check=True, capture_output=True)
        return json.loads((tmp_path / "associative_recall.json").read_text())["rows"]

    told("nsa", "full")
    rows = told("full", "window")
    assert [(row["arm"], row["step"], len(row["read"])) for row in rows] == [
        ("nsa", 1, 2), ("nsa", 2, 2), ("full", 1, 0), ("full", 2, 0), ("window", 1, 0), ("window", 2, 0),
    ]  # fmt: skip
    assert len({row["asked"] for row in rows}) == 1
    assert (tmp_path / "associative_recall.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--facts", "33", "--words", "40"], "--facts 33 must be 1 to 32"),
        (["--facts", "9", "--words", "8"], "--facts 9 must be 1 to 8"),
        (["--words", "150"], "--words 150 less than half of model.vocab=300"),
        (["--set", "attention.window=192"], "no fact lies behind window and forced blocks"),
        (["--name", "a/b"], "--name 'a/b'"),
    ],
)
def test_what_cannot_be_asked_is_refused(script, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.setattr("sys.argv", ["associative_recall.py", "--out", str(tmp_path), *words])
    assert script.main() == 2
    assert said in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
