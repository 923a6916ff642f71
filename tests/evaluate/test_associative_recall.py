"""The script that asks whether an arm learns to find facts: its documents, what needs selection, and what it writes."""

import json
import math
import subprocess
import sys

import pytest
import torch
from helpers import load_script

from nsa_train.config.load import load_config
from nsa_train.data.loader import NO_LABEL
from nsa_train.model.attention import Attended
from nsa_train.model.branches import spec_of
from nsa_train.model.transformer import Transformer
from nsa_train.ops.fixed_blocks import fixed_blocks
from nsa_train.packing import Packing

FACTS = 8
TASK = (FACTS, 40)  # facts, words


@pytest.fixture
def script(monkeypatch):
    return load_script("associative_recall", monkeypatch)


@pytest.fixture
def config(script):
    return load_config([*script.SMALL, "attention=nsa"])


def test_every_question_has_its_fact_before_it(script, config):
    tokens, labels, fact = script.documents(config, TASK, 0)
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
    assert not torch.equal(tokens, script.documents(config, TASK, 1).tokens)


def test_selection_is_needed_where_neither_forced_blocks_nor_the_window_hold_the_fact(script, config):
    spec, T = spec_of(config.attention), config.trainer.seq_len
    _, _, fact = script.documents(config, TASK, 0)
    needs, _ = script.selected(config, fact)
    forced = fixed_blocks(torch.arange(T), 1, spec, None)[:, 0]
    for row, place in (fact >= 0).nonzero().tolist():
        at = int(fact[row, place])
        hidden = at // spec.slc_block not in forced[place].tolist() and place - at >= spec.window
        assert bool(needs[row, place]) == hidden
    assert 0 < needs.sum() < (fact >= 0).sum()


def test_the_chance_is_that_of_blocks_drawn_at_random(script, config):
    spec, T = spec_of(config.attention), config.trainer.seq_len
    _, _, fact = script.documents(config, TASK, 0)
    needs, chance = script.selected(config, fact)
    row, place = needs.nonzero(as_tuple=True)
    block = fact[row, place] // spec.slc_block
    draws = [fixed_blocks(torch.arange(T), 1, spec, torch.tensor(seed))[:, 0] for seed in range(300)]
    held = torch.stack([(drawn[place] == block[:, None]).any(-1) for drawn in draws]).double().mean()
    assert float(held) == pytest.approx(float(chance[needs].mean()), abs=0.01)


class Knows:
    """In place of a model: gives each question's answer, and reads the block of every third place's fact."""

    def __init__(self, script, config):
        self.script, self.config, self.asked = script, config, []

    def watch(self, watcher):
        self.watcher = watcher

    def eval(self):
        return self

    train = eval

    def logits(self, tokens, packing):
        made = self.script.documents(self.config, TASK, ("asked", len(self.asked)))
        assert torch.equal(made.tokens.flatten(), tokens)
        self.asked.append(tokens)
        fact, answer = made.fact.flatten(), made.labels.flatten()
        block = torch.where(torch.arange(len(fact)) % 3 == 0, fact // self.config.attention.slc_block, -1)
        self.watcher(0, Attended(None, None, block[:, None, None].expand(-1, 2, 3)))
        return torch.nn.functional.one_hot(answer.clamp_min(0), self.config.model.vocab) * 5.0


def packing_of(config):
    return Packing.from_lengths((config.trainer.seq_len,) * config.trainer.batch_rows)


def test_answers_and_blocks_are_counted(script, config):
    model = Knows(script, config)
    found = script.ask(model, config, TASK, packing_of(config))
    assert found["right"] == 1
    assert found["loss"] == pytest.approx(math.log(1 + (config.model.vocab - 1) * math.exp(-5)))
    needed = []
    for number, tokens in enumerate(model.asked):
        fact = script.documents(config, TASK, ("asked", number)).fact
        needed += script.selected(config, fact).needs.flatten().nonzero()[:, 0].tolist()
        assert not any(torch.equal(tokens, other) for other in model.asked[:number])
    assert found["asked"] == len(needed)
    assert len(model.asked) * config.trainer.batch_rows == 64
    assert found["read"] == [pytest.approx(sum(place % 3 == 0 for place in needed) / len(needed))]


def test_blocks_drawn_at_random_are_read_by_chance(script):
    config = load_config([*script.SMALL, "attention=nsa_random"])
    model = Transformer(config.model, config.attention, config.moe)
    model.start(seed=0)
    found = script.ask(model, config, TASK, packing_of(config))
    assert found["read"] == pytest.approx([found["chance"]] * 2, abs=0.05)
    assert found["right"] < 0.15


def test_arms_add_up_in_one_file(script, tmp_path):
    def told(*words, steps=2):
        words = ["--every", "1", "--out", str(tmp_path), *words, "--set", f"trainer.steps={steps}"]
        done = subprocess.run([sys.executable, script.__file__, *words], check=False, capture_output=True, text=True)
        return done.returncode, done.stderr

    def rows():
        return json.loads((tmp_path / "associative_recall.json").read_text())["rows"]

    assert told("--arms", "nsa", "full") == (0, "")
    first = rows()
    assert first[1]["loss"] < first[0]["loss"]
    assert first[3]["loss"] < first[2]["loss"]
    assert told("--arms", "full", "window", "--minutes", "0") == (0, "")
    assert [(row["arm"], row["step"], len(row["read"])) for row in rows()] == [
        ("nsa", 1, 2), ("nsa", 2, 2), ("full", 1, 0), ("window", 1, 0),
    ]  # fmt: skip
    assert len({row["asked"] for row in rows()}) == 1
    assert (tmp_path / "associative_recall.png").read_bytes()[:4] == b"\x89PNG"
    code, said = told("--arms", "full", steps=3)
    assert code == 2
    assert "holds answers to other questions" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--facts", "33", "--words", "40"], "--facts 33 must be 1 to 32"),
        (["--facts", "9", "--words", "8"], "--facts 9 must be 1 to 8"),
        (["--words", "150"], "--words 150 must be positive and less than half of model.vocab=300"),
        (["--set", "attention.window=192"], "no fact lies behind window and forced blocks"),
        (["--words", "0"], "--words 0 must be positive"),
        (["--every", "0"], "--every 0 must be 1 or more"),
        (["--name", "a/b"], "--name 'a/b'"),
        (["--out", __file__], "there is a file of that name"),
    ],
)
def test_what_cannot_be_asked_is_refused(script, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.setattr("sys.argv", ["associative_recall.py", "--out", str(tmp_path), *words])
    assert script.main() == 2
    assert said in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
