"""A document of ten million tokens goes through preparation, packing into rows of 64k and the loader."""

import dataclasses
import json

import numpy as np
import pytest
from loaders import make_loader

from nsa_train.data.loader import NO_SOURCE
from nsa_train.data.prepare import prepare
from nsa_train.data.store import TokenStore
from nsa_train.data.tokenizer import Tokenizer

SEQ_LEN = 65536


@pytest.fixture(scope="module")
def corpus(prepared, module_texts, tmp_path_factory):
    """(store, text) of the long document and two short ones."""
    root = tmp_path_factory.mktemp("long")
    text = "".join(module_texts.values())
    text = "".join(f"# copy {i}\n{text}" for i in range(250))
    records = [module_texts["abc"], text, module_texts["csv"]]
    (root / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in records))
    (root / "held.txt").write_text(module_texts["cmd"])
    data = dataclasses.replace(
        prepared[0], root=str(root), prepared_dir=str(root / "prepared"), heldout_paths=("held.txt",), workers=2,
        tokenizer_sample_mb=1,
    )  # fmt: skip
    return TokenStore.open(prepare(data, 400, lambda line: None), "train"), text


def test_it_is_tokenised_in_pieces_to_the_tokens_of_the_whole(corpus):
    store, text = corpus
    assert store.lengths[1] > 10_000_000
    assert store.manifest["train"]["longest"] == store.lengths[1]
    assert np.array_equal(
        store.tokens[store.offsets[1] : store.offsets[2] - 1], Tokenizer.load(store.tokenizer).encode(text)
    )


@pytest.mark.parametrize("packing", ["best_fit", "concat", "long"])
def test_an_epoch_of_64k_rows_holds_every_token_once_at_its_true_place(packing, corpus):
    store, _ = corpus
    loader = make_loader(store, seq_len=SEQ_LEN, batch_rows=1, packing=packing, align=64, max_documents=64)
    (stream,) = loader.streams(0)
    assert stream.whole.rows <= 2 + len(store.tokens) // SEQ_LEN
    found, seen = np.zeros_like(store.tokens), np.zeros(len(store.tokens), int)
    for step in range(stream.whole.rows):
        (row,) = loader.step_rows(step)
        (batch,) = loader.micro_batches(step, 0, 1, 1)
        real = (batch.sources != NO_SOURCE).numpy()
        at = (
            np.repeat(store.offsets[row.plan.doc[row.pieces]], row.plan.length[row.pieces]) + batch.places.numpy()[real]
        )
        found[at] = batch.tokens.numpy()[real]
        seen[at] += 1
    assert (seen == 1).all()
    assert np.array_equal(found, store.tokens)
