"""Claims about the tokenizer: nothing of a text is lost, and training is repeatable."""

import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_train.data.tokenizer import WORD, Tokenizer, _sample_lines, train_tokenizer
from nsa_train.errors import DataError

ODD_TEXT = "a\tb\n\n    two  spaces \r\n中文字 🎉👩‍👩‍👧 é \u0301 \x00 </s> <unk> <0x0A> 12345\n\n"


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(kind, module_texts):
    return train_tokenizer(module_texts.values(), 500, kind, 1, 0)


def test_text_comes_back_exactly(tokenizer, module_texts):
    for text in [ODD_TEXT, "", "\n", " ", *module_texts.values()]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def whole(tokenizer, text):
    """Tokens of the text as SentencePiece alone gives them."""
    return np.array(tokenizer._processor.encode(text, out_type=int))


def test_encoding_word_by_word_gives_the_tokens_of_the_whole_text(kind, tokenizer, module_texts):
    assert tokenizer.splits
    for text in [ODD_TEXT * 200, "no newline " * 900, "x" * 5000, " \n  \n ", *module_texts.values()]:
        by_word, at_once = tokenizer.encode(text), whole(tokenizer, text)
        assert len(by_word) == len(at_once)
        assert np.mean(by_word != at_once) <= (0 if kind == "bpe" else 5e-3)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("ab \n\t.\u2581é中1") | st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_is_its_words_and_comes_back(kind, tokenizer, text):
    ids = tokenizer.encode(text)
    assert len(ids) == len(whole(tokenizer, text))
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")


def test_a_full_memory_of_words_is_emptied_and_changes_nothing(tokenizer, module_texts, monkeypatch):
    expected = [tokenizer.encode(text) for text in module_texts.values()]
    monkeypatch.setattr("nsa_train.data.tokenizer.KNOWN_WORDS", 50)
    for text, ids in zip(module_texts.values(), expected, strict=True):
        assert np.array_equal(tokenizer.encode(text), ids)
    *_, last = module_texts.values()
    assert len(tokenizer._words) <= 50 + len(set(WORD.findall(last)))


def test_no_text_contains_the_end_of_a_document(tokenizer):
    assert tokenizer.eos not in tokenizer.encode(ODD_TEXT)


def test_training_twice_gives_the_same_bytes_without_machine_paths(kind, module_texts, tmp_path):
    first, second = (train_tokenizer(module_texts.values(), 450, kind, 1, 0) for _ in range(2))
    assert first.sha256 == second.sha256
    path = first.save(tmp_path)
    assert str(tmp_path).encode() not in path.read_bytes()
    assert Tokenizer.load(path).sha256 == first.sha256
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
    assert np.array_equal(foreign.encode(text), whole(foreign, text))
    assert not foreign.splits


def test_a_model_whose_pieces_reach_across_spaces_is_given_whole_texts(module_texts, tmp_path):
    import sentencepiece

    prefix = str(tmp_path / "foreign")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["in the end of the day " * 9, *module_texts["abc"].split("\n")]), model_prefix=prefix,
        vocab_size=450, model_type="bpe", byte_fallback=True, minloglevel=2, split_by_whitespace=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        user_defined_symbols=["\n"],
    )  # fmt: skip
    foreign = Tokenizer.load(prefix + ".model")
    assert not foreign.splits
    assert np.array_equal(foreign.encode("at the end of the day"), whole(foreign, "at the end of the day"))


def test_too_little_text_for_the_vocabulary_says_what_to_set():
    with pytest.raises(DataError, match=r"vocabulary of 2000 .*<= \d+.*set model\.vocab"):
        train_tokenizer(["too short\n"], 2000, "bpe", 1, 0)


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


@pytest.fixture(scope="module")
def hugging_face(module_texts, tmp_path_factory):
    """The folder of a byte-level BPE tokenizer as transformers saves it."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("hugging_face")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(module_texts.values(), vocab_size=600, special_tokens=["<|end|>"], show_progress=False)
    trained.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|end|>"}, "other": 1}')
    return folder


def test_a_tokenizer_of_hugging_face_gives_every_text_back_exactly(hugging_face, module_texts):
    tokenizer = Tokenizer.load(hugging_face)
    for text in [ODD_TEXT, "", "\n", " ", "x" * 50_000, " <|end|> ", *module_texts.values()]:
        ids = tokenizer.encode(text)
        assert tokenizer.eos not in ids
        assert tokenizer.decode([*ids, tokenizer.eos]) == text
        assert ids.max(initial=0) < tokenizer.vocab == 600


def test_what_is_saved_of_a_hugging_face_tokenizer_is_the_same_tokenizer(hugging_face, tmp_path):
    first = Tokenizer.load(hugging_face / "tokenizer.json")
    second = Tokenizer.load(first.save(tmp_path))
    assert (first.sha256, first.eos, first.vocab) == (second.sha256, second.eos, second.vocab)
    assert np.array_equal(first.encode(ODD_TEXT), second.encode(ODD_TEXT))


def test_transformers_opens_the_tokenizer_that_was_saved_and_agrees(hugging_face, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.load(hugging_face)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(ODD_TEXT, add_special_tokens=False, split_special_tokens=True).input_ids == list(
        tokenizer.encode(ODD_TEXT)
    )
    assert theirs.eos_token_id == tokenizer.eos


def test_a_folder_without_tokenizer_or_end_of_document_is_named(hugging_face, tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json: no such file; write it with AutoTokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer of Hugging Face's"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((hugging_face / "tokenizer.json").read_bytes())
    with pytest.raises(DataError, match=r"tokenizer_config\.json: cannot be read"):
        Tokenizer.load(tmp_path)
    for eos, problem in (("null", "names no eos_token"), ('"nowhere"', "'nowhere' is not in tokenizer.json")):
        (tmp_path / "tokenizer_config.json").write_text(f'{{"eos_token": {eos}}}')
        with pytest.raises(DataError, match=problem):
            Tokenizer.load(tmp_path)
