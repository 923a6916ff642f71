"""Claims about `nsa-train data inspect`: what it shows is what the loader gives."""

import dataclasses
import re

import numpy as np
import pytest

from nsa_train.cli import main
from nsa_train.config.load import load_config
from nsa_train.data.inspect import Question, inspect
from nsa_train.data.loader import Loader
from nsa_train.data.stages import stages_of
from nsa_train.data.store import TokenStore
from nsa_train.data.tokenizer import Tokenizer
from nsa_train.errors import ConfigError


@pytest.fixture
def config(prepared):
    data = dataclasses.replace(prepared[0], mixture={"long": 0.75, "short": 0.25}, align=8)
    base = load_config(["model.vocab=400", "trainer.batch_rows=4"])
    return dataclasses.replace(base, data=data)


@pytest.fixture
def loader(config, prepared):
    return Loader(TokenStore.open(prepared[1], "train"), stages_of(config), config.data, config.seed)


def report(config, **question):
    return list(inspect(config, Question(**question)))


def test_it_names_the_documents_of_every_row_of_the_step(config, loader):
    lines = [line for line in report(config, step=7) if re.match(r"  row \d", line)]
    for line, row in zip(lines, loader.step_rows(6), strict=True):
        pieces = [tuple(map(int, found)) for found in re.findall(r"(\d+):(\d+)-(\d+)", line)]
        plan = row.plan
        doc, start, length = (getattr(plan, key)[row.pieces].tolist() for key in ("doc", "start", "length"))
        assert pieces == [(d, s, s + n - 1) for d, s, n in zip(doc, start, length, strict=True)]


def test_it_shows_a_row_as_text_with_its_borders(config, loader, store, prepared):
    text = "\n".join(report(config, step=2, row=3, show=10**6))
    shown = text[text.index("step 2, row 3 as text") :]
    row, tokenizer = loader.step_rows(1)[2], Tokenizer.load(store.tokenizer)
    doc, start, length = (getattr(row.plan, key)[row.pieces].tolist() for key in ("doc", "start", "length"))
    wanted = ["step 2, row 3 as text"]
    for d, s, n in zip(doc, start, length, strict=True):
        size, source = store.lengths[d], store.manifest["sources"][store.sources[d]]
        ends = ("begins" if s == 0 else "goes on") + (", ends" if s + n == size else ", is cut")
        wanted.append(f"──── document {d} of {source}: tokens {s}-{s + n - 1} of {size}; {ends} ────")
        wanted.append(tokenizer.decode(store.tokens[store.offsets[d] + s :][:n]))
    wanted.append(f"──── {512 - sum(length)} places of padding ────")
    assert shown == "\n".join(wanted)


def test_a_long_document_is_shown_at_its_ends(config):
    lines = report(config, show=3)
    assert any(re.fullmatch(r" +\.\.\. \d+ tokens \.\.\.", line) for line in lines)
    assert sum(map(len, lines)) < 6000


def test_it_tells_the_mixture_that_was_read(config, loader):
    lines = [line for line in report(config, step=50) if "epochs  (weight now" in line]
    read, epochs = loader.tokens_read(50), loader.epochs(50)
    for name, line in zip(["long", "short"], lines, strict=True):
        i = loader._names.index(name)
        assert f"{read[i]:,} tokens" in line
        assert f"{epochs[name]:.3f} epochs" in line
    assert "weight now: long 75.0%" in lines[0]
    assert read[loader._names.index("long")] / read.sum() == pytest.approx(0.75, abs=0.02)


def test_the_histogram_counts_every_document_once(config, store):
    found = [re.search(r"([\d,]+) documents +([\d.]+)% of tokens", line) for line in report(config)]
    documents = [int(match.group(1).replace(",", "")) for match in found if match]
    assert sum(documents) == len(store.lengths)
    assert sum(float(match.group(2)) for match in found if match) == pytest.approx(100, abs=1)


def test_duplicates_and_held_out_text_in_the_training_split_are_counted(config, prepared, monkeypatch):
    """Document 1 becomes a copy of document 0, and the held-out split a part of the training split."""
    train = TokenStore.open(prepared[1], "train")
    a, b = train.offsets[:2].tolist(), train.offsets[1]
    tokens = np.concatenate([train.tokens[: a[1]], train.tokens])
    doubled = dataclasses.replace(
        train, tokens=tokens, offsets=np.concatenate([[0], train.offsets + a[1]]),
        sources=np.concatenate([train.sources[:1], train.sources]),
    )  # fmt: skip
    part = dataclasses.replace(
        train, split="heldout", tokens=train.tokens[:b], offsets=train.offsets[:2], sources=train.sources[:1]
    )
    clean = "\n".join(report(config))
    monkeypatch.setattr(TokenStore, "open", lambda folder, split: doubled if split == "train" else part)
    text = "\n".join(report(config))
    assert "0 training documents equal an earlier one" in clean
    assert "1 training documents equal an earlier one" in text
    assert "1 held-out documents equal a training document" in text
    assert "100.00% of held-out passages" in text
    repeated = [float(re.search(r"([\d.]+)% of training passages", t).group(1)) for t in (clean, text)]
    assert repeated[1] > repeated[0] + 100 * a[1] / len(tokens)


def test_the_words_of_a_question_are_told_from_those_of_the_configuration():
    question, others = Question.parse(["step=12", "trainer.steps=3", "row=2", "data=files"])
    assert (question.step, question.row, others) == (12, 2, ["trainer.steps=3", "data=files"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "step=0"], "error: step=0: step must be a number from 1 on"),
        (["inspect", "row=x"], "error: row=x: row must be a number from 1 on"),
        (["look"], "error: data: name what to do, like"),
    ],
)
def test_a_wrong_question_is_one_line(words, message, capsys):
    assert main(["data", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_row_that_the_step_does_not_have_is_refused(config):
    with pytest.raises(ConfigError, match="row=5: step 3 has 4 rows"):
        report(config, step=3, row=5)
