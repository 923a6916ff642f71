"""Claims about the tokenizer: nothing of a text is lost, and training is repeatable."""

import sysconfig
from pathlib import Path

import numpy as np
import pytest

from nsa_train.data.tokenizer import Tokenizer, _chunks, _sample_lines, train_tokenizer
from nsa_train.errors import DataError

ODD_TEXT = "a\tb\n\n    two  spaces \r\n中文字 🎉👩‍👩‍👧 é \u0301 \x00 </s> <unk> <0x0A> 12345\n\n"


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(kind, module_texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(module_texts.values(), 500, kind, 1, 0, path)


def test_text_comes_back_exactly(tokenizer, module_texts):
    for text in [ODD_TEXT, "", "\n", " ", *module_texts.values()]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_encoding_in_chunks_gives_the_tokens_of_the_whole_text(kind, tokenizer, module_texts):
    for text in [ODD_TEXT * 200, "no newline " * 900, *module_texts.values()]:
        chunked, whole = tokenizer.encode(text), tokenizer._encode([text])
        assert len(chunked) == len(whole)
        assert np.mean(chunked != whole) <= (0 if kind == "bpe" else 1e-3)


def test_a_tokenizer_of_ours_puts_nothing_before_a_text_and_so_is_cut_at_newlines(tokenizer):
    assert tokenizer._cuts_at_newlines
    assert np.array_equal(tokenizer.encode("\n\n"), tokenizer.encode("\n").repeat(2))


def test_every_chunk_but_the_last_ends_behind_a_newline():
    text = "some words\n" * 1000 + "no newline " * 900
    chunks = _chunks(text)
    assert "".join(chunks) == text
    assert len(chunks) > 5
    assert all(chunk.endswith("\n") for chunk in chunks[:-1])


def test_no_text_contains_the_end_of_a_document(tokenizer):
    assert tokenizer.eos not in tokenizer.encode(ODD_TEXT)


def test_training_twice_gives_the_same_bytes_without_machine_paths(kind, module_texts, tmp_path):
    first, second = (train_tokenizer(module_texts.values(), 450, kind, 1, 0, tmp_path / n) for n in ("a", "b"))
    assert first.sha256 == second.sha256
    assert str(tmp_path).encode() not in (tmp_path / "a").read_bytes()
    assert Tokenizer.load(tmp_path / "a").sha256 == first.sha256
    assert first.vocab == 450


def test_a_model_that_changes_at_newlines_is_given_whole_texts(module_texts, tmp_path):
    import sentencepiece

    prefix = str(tmp_path / "foreign")
    lines = (line for text in module_texts.values() for line in text.split("\n") if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=prefix, vocab_size=400, byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
    )  # fmt: skip
    foreign = Tokenizer.load(prefix + ".model")  # puts a space before every text it encodes
    text = "some words on a line\n" * 500
    assert np.array_equal(foreign.encode(text), foreign._encode([text]))


def test_too_little_text_for_the_vocabulary_says_what_to_set(tmp_path):
    with pytest.raises(DataError, match=r"vocabulary of 2000 .*<= \d+.*set model\.vocab"):
        train_tokenizer(["too short\n"], 2000, "bpe", 1, 0, tmp_path / "x")


def test_a_file_that_is_no_model_is_named(tmp_path):
    (tmp_path / "x.model").write_bytes(b"certainly not a model")
    with pytest.raises(DataError, match=r"x\.model: not a SentencePiece model"):
        Tokenizer.load(tmp_path / "x.model")
    with pytest.raises(DataError, match=r"y\.model: cannot be read"):
        Tokenizer.load(tmp_path / "y.model")


def test_the_sample_is_drawn_evenly_from_the_whole_corpus():
    texts = [f"{part} {line}\n" for part in range(10) for line in range(3000)]
    sample = _sample_lines(texts, 20_000, 7)
    share = np.bincount([int(line.split()[0]) for line in sample], minlength=10) / len(sample)
    assert 20_000 <= sum(map(len, sample)) < 20_100
    assert np.abs(share - 0.1).max() < 0.03
    assert sample == _sample_lines(texts, 20_000, 7) != _sample_lines(texts, 20_000, 8)


def test_a_small_corpus_is_sampled_whole():
    stdlib = Path(sysconfig.get_path("stdlib"))
    text = (stdlib / "abc.py").read_text("utf-8")
    assert sorted(_sample_lines([text], 10**6, 0)) == sorted(line for line in text.split("\n") if line)
