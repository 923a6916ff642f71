"""Answers are scored token by token, cells by zone, and the blocks that were read by what they hold."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from nsa_train.bench.figures import plot_grids
from nsa_train.cli import main
from nsa_train.config.load import load_config, to_yaml
from nsa_train.errors import ConfigError
from nsa_train.evaluate.command import Options
from nsa_train.evaluate.grid import Answer, answers, cells, summary, wilson
from nsa_train.evaluate.questions import Asked, Document

ATTENTION = load_config().attention
VOCAB = 30


class Oracle:
    """Predicts the next token, except where it is told to be wrong; two layers chose the blocks they are given."""

    def __init__(self, wrong=(), blocks=None):
        self.embed = torch.nn.Embedding(VOCAB, 2)
        self.head, self.wrong, self.blocks, self.packed = torch.nn.Identity(), wrong, blocks, []

    def keep_blocks(self, kept):
        self.kept = kept

    def hidden(self, tokens, packing):
        self.packed.append(packing.lengths)
        logits = torch.nn.functional.one_hot(tokens.roll(-1), VOCAB).float() * 20
        for place in self.wrong:
            logits[place - 1] = logits[place - 1].roll(1)
        if self.blocks is not None:
            self.kept += [blocks.expand(len(tokens), -1, -1) for blocks in self.blocks]
        return logits, None, None


def document(length=200, asked=((150, 155),), facts=((20, 30),)):
    tokens = np.random.default_rng(length).integers(0, VOCAB, length)
    return Document(tokens, tuple(Asked(answer, facts, i) for i, answer in enumerate(asked)))


def test_an_answer_is_right_when_every_token_is():
    documents = [document(200), document(300, ((280, 285), (290, 292)))]
    found = list(answers(Oracle(), documents, ATTENTION, 1000))
    assert [answer.right for answer in found] == [True] * 3
    assert [answer.document for answer in found] == [0, 1, 1]
    assert max(answer.loss for answer in found) < 1e-3
    found = list(answers(Oracle(wrong=(200 + 284, 154)), documents, ATTENTION, 1000))
    assert [answer.right for answer in found] == [False, False, True]
    assert found[0].loss == pytest.approx(20 / 5, abs=0.1)


def test_batches_hold_at_most_the_tokens_they_may_and_one_document_at_least():
    model = Oracle()
    list(answers(model, [document(n) for n in (200, 160, 400, 160, 160)], ATTENTION, 360))
    assert model.packed == [(200, 160), (400,), (160, 160)]


def test_selection_recall_counts_the_facts_that_the_chosen_blocks_hold():
    """Facts in tokens 16 to 31 (block 1) and 47 to 48 (blocks 2 and 3)."""
    blocks = torch.tensor([[[0, 1, 9], [0, 8, 9]], [[0, 3, 9], [2, -1, -1]]])  # [layers, Hk, n]
    (found,) = answers(Oracle(blocks=blocks), [document(facts=((16, 32), (47, 49)))], ATTENTION, 1000)
    assert found.selected == pytest.approx((0.5 + 0 + 0.5 + 0.5) / 4)
    (found,) = answers(Oracle(), [document()], ATTENTION, 1000)
    assert found.selected is None


ZONES = ("forced", None, None, "window")
FOUND = [
    Answer(right, 1.0, zone, 0.5, depth, 2 * depth + second)
    for depth, zone in enumerate(ZONES) for second, right in enumerate((True, depth == 2))
]  # fmt: skip


def test_cells_in_a_zone_are_marked_and_left_out_of_the_summary():
    rows = list(cells(FOUND, 512, 4))
    assert [(row["depth"], row["zone"], row["accuracy"]) for row in rows] == [
        (0, "forced", 0.5), (pytest.approx(1 / 3), None, 0.5), (pytest.approx(2 / 3), None, 1.0), (1, "window", 0.5),
    ]  # fmt: skip
    whole = summary(FOUND, 512)
    assert (whole["samples"], whole["cells"], whole["accuracy"], whole["selection_recall"]) == (4, 2, 0.75, 0.5)
    assert summary(FOUND[:2], 512) == {"length": 512, "cells": 0, "samples": 0}


def test_a_cell_counts_its_questions_that_need_selection():
    told = [(True, 1.0, "window"), (False, 2.0, None), (True, 2.0, None)]
    mixed = [Answer(*words, 0.5, 0, number) for number, words in enumerate(told)]
    (cell,) = cells(mixed, 512, 1)
    assert (cell["zone"], cell["samples"], cell["accuracy"], cell["loss"]) == (None, 2, 0.5, 2.0)
    assert summary(mixed, 512) == {
        "cells": 1,
        **{key: value for key, value in cell.items() if key not in ("depth", "zone")},
    }


def test_wilsons_interval_is_that_of_the_books():
    assert wilson(0, 20) == (0, pytest.approx(0.1611, abs=1e-4))
    assert wilson(10, 20) == (pytest.approx(0.2993, abs=1e-4), pytest.approx(0.7007, abs=1e-4))
    assert wilson(20, 20)[1] == pytest.approx(1)


def test_the_interval_counts_documents_not_questions():
    same = [Answer(number == 0, 1.0, None, None, 0, number) for number in range(4) for _ in range(25)]
    found = summary(same, 512)
    assert (found["samples"], found["accuracy"]) == (100, 0.25)
    assert (found["low"], found["high"]) == wilson(1, 4)


def test_the_heat_map_is_drawn(tmp_path):
    plot_grids({"title": [row for n in (512, 1024) for row in cells(FOUND, n, 4)]}, tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").mode == "P"  # of a palette: small


def test_cells_that_need_no_selection_are_grey(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("nsa_train.bench.figures.save_figure", lambda figure, path: figures.append(figure))
    rows = [{"length": length, "depth": depth, "accuracy": 1.0, "zone": None}
            for length in (512, 1024) for depth in (0.0, 0.5, 1.0)]  # fmt: skip
    rows[4]["zone"] = "window"
    plot_grids({"title": rows}, tmp_path / "grid.png")
    (grey,) = figures[0].axes[0].patches
    assert (grey.get_x(), grey.get_y(), grey.get_width(), grey.get_height()) == (0.5, 0.5, 1, 1)


def test_options_are_read():
    options = Options.parse(["task=needle", "lengths=[512,1024]", "samples=3"])
    assert options == Options(("needle",), (512, 1024), 21, 3)
    assert options.name_of("needle") == "needle"
    options = Options.parse(["task=needle,heldout", "words=train"])
    assert [options.name_of(task) for task in options.task] == ["needle_train", "heldout"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["task=needles"],
            "no task; say task= some of needle, multikey, vartrace, mqar, heldout, blocks, maps",
        ),
        ([], "task= is no task"),
        (["task=needle", "lengths=8k"], "lengths=8k must be numbers from 1 on"),
        (["task=needle", "depths=0"], "depths=0 must be a number from 1 on"),
        (["task=needle", "length=512"], "'length=512' is none of task=, lengths=, depths=, samples=, words="),
        (["task=needle", "words=test"], "words=test must be train or heldout"),
    ],
)
def test_wrong_options_are_named(words, message):
    with pytest.raises(ConfigError) as caught:
        Options.parse(words)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=needle"], "name the folder of a run first"),
        (["{}/none", "task=needle"], "none/config.yaml: cannot be read"),
        (["{}", "task=needle"], "export: no export of a finished run; train with trainer.export=true"),
        (["{}", "task=needle", "lengths=99999"], "lengths=99999 is beyond the model's max_seq_len=65536"),
    ],
)
def test_a_folder_that_cannot_be_asked_is_one_message(words, message, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(to_yaml(load_config()))
    assert main(["eval", *(word.format(tmp_path) for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_a_run_or_an_export_of_another_version_is_one_message_with_the_key(tmp_path, capsys):
    from nsa_train.model.pretrained import NSATrainConfig, NSATrainForCausalLM

    config = load_config(["model.layers=1", "model.vocab=300"])
    path, export = tmp_path / "config.yaml", tmp_path / "export"
    path.write_text(to_yaml(config).replace("  window:", "  span: 3\n  window:"))
    assert main(["eval", str(tmp_path), "task=needle"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}: 1 problem in the configuration:\n  attention.span: no such key")
    assert "if another version of nsa_train wrote it, use that one" in said

    path.write_text(to_yaml(config))
    NSATrainForCausalLM(NSATrainConfig.of(config.model, config.attention, config.moe)).save_pretrained(export)
    keys = json.loads((export / "config.json").read_text())
    del keys["model"]["embedding_std"]
    (export / "config.json").write_text(json.dumps(keys))
    assert main(["eval", str(tmp_path), "task=needle"]) == 2
    said = capsys.readouterr().err
    assert f"error: {export}: another version of nsa_train wrote its config.json; use that one, or train and" in said
    assert "  model.embedding_std: missing\n" in said
