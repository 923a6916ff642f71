"""At every length the same held-out tokens are labels, and what a row shows of the past is all that differs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nsa_train.config.load import load_config
from nsa_train.data.store import TokenStore
from nsa_train.evaluate.heldout import longest_documents, losses_in_rows

LENGTHS = np.array([700, 30, 256, 1, 129])  # of the documents
MOST = 512
TRAINER = load_config(["trainer.micro_rows=1", "trainer.seq_len=256"]).trainer


class Counting:
    """The loss of a label is what it says, plus a thousandth of the tokens that its row showed before it."""

    def __init__(self):
        self.embed, self.labels, self.passes = torch.nn.Embedding(2, 2), [], []

    def __call__(self, tokens, labels, packing, chunk_tokens):
        assert packing.tokens == len(tokens) == len(labels)
        counted = labels >= 0
        assert torch.equal(labels[:-1][counted[:-1]], tokens[1:][counted[:-1]])
        self.labels += labels[counted].tolist()
        self.passes.append(packing.lengths)
        losses = torch.where(counted, labels + 1e-3 * (packing.positions + 1), 0.0)
        return SimpleNamespace(token_losses=losses)


@pytest.fixture
def store(tmp_path):
    offsets = np.cumsum([0, *LENGTHS])
    sources = np.array([0, 1, 1, 0, 2], np.int32)
    tokens = np.random.default_rng(0).integers(0, 50, offsets[-1]).astype(np.uint16)
    return TokenStore(tmp_path, "heldout", {"sources": ["a", "b", "c", "d"]}, tokens, offsets, sources)


def found_at(length, store, documents=(0, 1, 2, 4)):
    model = Counting()
    return losses_in_rows(model, store, np.array(documents), MOST, length, TRAINER), model


@pytest.mark.parametrize("length", [1, 64, 100, 256, 512, 1000])
def test_the_same_tokens_are_labels_at_every_length(length, store):
    found, model = found_at(length, store)
    texts = [
        store.tokens[a : min(b, a + MOST)].astype(int) for a, b in zip(store.offsets, store.offsets[1:], strict=False)
    ]
    want = [texts[i][1:] for i in (0, 1, 2, 4)]
    assert model.labels == np.concatenate(want).tolist()
    assert found["labels"] == sum(found["by_document"]["labels"]) == len(model.labels)
    assert found["by_document"]["document"] == [0, 1, 2, 4]
    assert found["by_document"]["source"] == ["a", "b", "b", "c"]
    shown = [np.arange(len(labels)) % length + 1 for labels in want]
    losses = [(labels + 1e-3 * seen).sum() for labels, seen in zip(want, shown, strict=True)]
    assert found["by_document"]["loss"] == pytest.approx(losses, rel=1e-6)
    assert found["loss"] == pytest.approx(sum(losses) / len(model.labels), rel=1e-6)
    assert found["by_source"]["b"] == pytest.approx(sum(losses[1:3]) / (29 + 255), rel=1e-6)
    assert set(found["by_source"]) == {"a", "b", "c"}


def test_buckets_double_up_to_the_row_and_to_the_document(store):
    found, model = found_at(256, store)
    assert list(found["by_position"]) == ["0-128", "128-256"]
    assert list(found["by_place"]) == ["0-128", "128-256", "256-512"]
    late = store.tokens[257:512].astype(int)  # labels of places 256 to 510 of the first document
    assert found["by_place"]["256-512"] == pytest.approx((late + 1e-3 * (np.arange(255) + 1)).mean(), rel=1e-6)
    assert model.passes == [(256,), (256,), (30,), (256,), (129,)]


def test_a_forward_pass_has_the_tokens_of_one_in_training(store):
    assert found_at(100, store)[1].passes[:3] == [(100, 100), (100, 100), (100, 12)]


def test_documents_are_the_longest_and_the_same_for_every_seed():
    lengths = np.array([5, 40, 7, 100, 60, 100, 100])
    for tokens in (100, 149):
        two = longest_documents(lengths, 50, tokens).tolist()
        assert two == sorted(two)
        assert (len(two), set(two) < {3, 4, 5, 6}) == (2, True)  # longer than a row can be: drawn among them
    assert longest_documents(lengths, 50, 240).tolist() == [1, 3, 4, 5, 6]
    assert longest_documents(lengths, 50, 10**6).tolist() == list(range(7))
    assert len(longest_documents(lengths, 50, 1)) == 1
    first = [int(longest_documents(np.full(n, 9), 9, 9)[0]) for n in range(2, 40)]
    assert sum(number > 0 for number in first) > 5  # not the order of the corpus
