"""Claims about the synthetic recall documents: solvable from their text, seeded, nothing shared between the splits."""

import re
from collections import Counter
from itertools import pairwise

import pytest

from nsa_train.config.load import load_config
from nsa_train.data import recall
from nsa_train.data.prepare import _key, prepare
from nsa_train.data.recall import ADJECTIVES, FACT_WEIGHT, FILLER, KINDS, NOUNS, WORDS, answers, recall_documents
from nsa_train.data.store import TokenStore
from nsa_train.data.tokenizer import Tokenizer, train_tokenizer
from nsa_train.errors import ConfigError, DataError

SPLITS = tuple(WORDS)


def made(split, documents=80, least=800, most=20_000):
    return list(recall_documents(split, documents, least, most))


def told(text, words):
    """What the document says before its questions: values of keys, and variables that are another's."""
    holes = {"{key}": r"(?P<key>[a-z]+)", "{value}": "(?P<value>[a-z]+ [a-z]+)", "{other}": "(?P<other>[a-z]+)"}
    facts, copies, order = {}, {}, []
    for line in text.split("\n"):
        for template in (words.needle, words.assign, words.copy):
            pattern = re.escape(template)
            for hole, group in holes.items():
                pattern = pattern.replace(re.escape(hole), group)
            if match := re.fullmatch(pattern, line):
                found = match.groupdict()
                order.append(found["key"])
                kept = facts if "value" in found else copies
                kept.setdefault(found["key"], found.get("value") or found["other"])  # what repeats it is a question
                break
    return facts, copies, order


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_question_is_answered_by_what_the_document_says(split, kind):
    for document in (d for d in made(split) if d.source == f"recall-{kind}"):
        facts, copies, order = told(document.text, WORDS[split])
        asked = answers(document.text, WORDS[split])
        assert asked
        for key, value in asked:
            hops = 0
            while key in copies:
                assert order.index(copies[key]) < order.index(key)  # a variable is told before it is copied
                key, hops = copies[key], hops + 1
            assert facts[key] == value
            assert (2 <= hops <= 4) == (kind == "tracing")


def test_kinds_ask_for_what_their_names_say():
    by_kind = {kind: [d for d in made("train") if d.source == f"recall-{kind}"] for kind in KINDS}
    counts = {
        kind: [(len(told(d.text, WORDS["train"])[0]), len(answers(d.text, WORDS["train"]))) for d in documents]
        for kind, documents in by_kind.items()
    }
    assert set(counts["needle"]) == {(n, n) for n in (1, 2, 3, 4)}
    assert all(keys == asked and 8 <= keys <= 128 for keys, asked in counts["multikey"])
    assert all(chains == asked >= 2 for chains, asked in counts["tracing"])
    assert all(keys == asked >= 8 for keys, asked in counts["mqar"])
    assert {kind: len(d) for kind, d in by_kind.items()} == {"needle": 16, "multikey": 16, "tracing": 16, "mqar": 32}


@pytest.mark.parametrize("split", SPLITS)
def test_a_question_repeats_the_words_before_the_value(split):
    """Of its fact; that of a chain the key of the last copy. What answers it follows the key at once."""
    words = WORDS[split]
    assert all(shape.endswith(" {key} {value}") for shape in (words.needle, words.assign, words.trace))
    assert words.copy.endswith(" {key} {other}")
    for document in made(split):
        lines = document.text.rstrip("\n").split("\n")
        asked = lines[-len(answers(document.text, words)) :]
        for line in asked:
            key = line.split(" ")[-3]
            if document.source == "recall-tracing":
                assert any(f" {key} " in told for told in lines[: -len(asked)])
            else:
                assert line in lines[: -len(asked)]


def test_the_splits_share_no_key_and_no_template():
    keys = [{key for d in made(split) for facts in told(d.text, WORDS[split])[:2] for key in facts} for split in SPLITS]
    assert all(len(found) > 500 for found in keys)
    assert not keys[0] & keys[1]
    for one, other in (SPLITS, SPLITS[::-1]):
        assert all(told(d.text, WORDS[other]) == ({}, {}, []) for d in made(one))
        assert all(answers(d.text, WORDS[other]) == [] for d in made(one))


@pytest.mark.parametrize("split", SPLITS)
def test_values_are_of_all_words_of_both_lists_alike(split):
    values = [value for d in made(split, 400) for value in told(d.text, WORDS[split])[0].values()]
    assert len(set(values)) > 0.9 * 64 * 64
    for place, words in enumerate((ADJECTIVES, NOUNS)):
        counts = Counter(value.split()[place] for value in values)
        assert set(counts) == set(words)
        assert 0.8 * max(counts.values()) < len(values) / 64 < 1.25 * min(counts.values())


def test_no_word_of_values_stands_anywhere_else():
    shapes = " ".join(shape for words in WORDS.values() for shape in words).split()
    assert len({*ADJECTIVES, *NOUNS}) == len(ADJECTIVES) + len(NOUNS) == 128
    assert not {*ADJECTIVES, *NOUNS} & {*FILLER, *shapes}


@pytest.mark.parametrize("split", SPLITS)
def test_the_token_before_an_answer_tells_it(split):
    """A model that looks where the last token stood before finds the fact, most often: few keys share a last piece."""
    tokenizer = train_tokenizer((d.text for d in made("train")), 2000, "bpe", 1, 0)
    assert all(len(tokenizer.encode(f" {word}")) == 1 for word in ADJECTIVES + NOUNS)
    facts = [told(d.text, WORDS[split])[0] for d in made(split) if d.source == "recall-multikey"]
    pieces = [[int(tokenizer.encode(f" {key}")[-1]) for key in document] for document in facts]
    shared = [sum(found.count(piece) - 1 for piece in found) / len(found) ** 2 for found in pieces]
    assert sum(shared) / len(shared) < 1 / 50


def test_documents_of_one_size_have_about_as_many_tokens_whatever_their_kind():
    tokenizer = train_tokenizer((d.text for d in made("train")), 2000, "bpe", 1, 0)
    for size in (3000, 30_000):
        documents = made("train", 4, int(size / FACT_WEIGHT), size)
        tokens = [len(tokenizer.encode(document.text)) for document in documents]
        assert max(tokens) < 1.3 * min(tokens)


def test_other_sizes_give_documents_with_other_facts():
    """Two sources of one corpus must not tell the same."""
    short, long = ([told(d.text, WORDS["train"])[0] for d in made("train", 80, least, 20_000)] for least in (800, 900))
    assert not any(one.items() & other.items() for one, other in zip(short, long, strict=True))


def test_the_same_number_gives_the_same_document_and_another_one_another():
    texts = [d.text for d in made("train")]
    assert texts == [d.text for d in made("train")]
    assert texts[:10] == [d.text for d in made("train", documents=10)]
    assert len(set(texts)) == len(texts)


def test_lengths_are_spread_evenly_over_their_orders_of_magnitude():
    sizes = [len(d.text) for d in made("train", 1200, 1000, round(FACT_WEIGHT * 64_000)) if d.source == "recall-mqar"]
    doublings = [sum(1000 * 2**i <= size < 1000 * 2 ** (i + 1) for size in sizes) for i in range(6)]
    assert sum(doublings) >= 0.97 * len(sizes)
    assert min(doublings) >= 0.12 * len(sizes)


def test_needles_lie_at_all_depths():
    depths = []
    for document in (d for d in made("train", 400) if d.source == "recall-needle"):
        depths += [document.text.index(key) / len(document.text) for key in told(document.text, WORDS["train"])[0]]
    tenths = [sum(low <= depth < high for depth in depths) for low, high in pairwise([i / 5 for i in range(6)])]
    assert min(tenths) >= 0.1 * len(depths)


def test_filler_says_nothing_that_a_question_could_ask_for():
    assert not [word for word in FILLER if re.fullmatch(r"([bcdfghjklmnpqrstvwxz][aeiou]){3}", word)]


def recall_corpus(tmp_path, *words):
    return load_config([
        "data.kind=recall", "data.paths=[train]", "data.heldout_paths=[heldout]", "data.take=40", "data.min_chars=300",
        "data.max_chars=3000", "model.vocab=400", f"data.prepared_dir={tmp_path}", "data.workers=1", *words,
    ])  # fmt: skip


def test_as_a_source_each_split_has_the_words_of_its_own(tmp_path):
    config = recall_corpus(tmp_path)
    folder = prepare(config.data, config.model.vocab, lambda line: None)
    for split in SPLITS:
        store = TokenStore.open(folder, split)
        tokenizer = Tokenizer.load(store.tokenizer)
        bounds = pairwise(store.offsets.tolist())
        texts = [tokenizer.decode(store.tokens[a:b]) for a, b in bounds]
        assert len(texts) == 40
        assert all(answers(text, WORDS[split]) for text in texts)
        assert all(300 <= len(text) <= 3000 for text in texts)


def test_a_source_without_sizes_or_of_unknown_words_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.kind=recall needs take \(documents\), min_chars and max_chars"):
        recall_corpus(tmp_path, "data.max_chars=null")
    config = recall_corpus(tmp_path, "data.paths=[test]")
    with pytest.raises(DataError, match=r"kind=recall: paths=\['test'\] must be train or heldout"):
        prepare(config.data, config.model.vocab, lambda line: None)


def test_a_corpus_of_other_documents_gets_another_folder(monkeypatch):
    with_recall, without = (load_config([f"data={name}"]).data for name in ("stdlib_recall", "stdlib"))
    before = [_key(data, 1024) for data in (with_recall, without)]
    monkeypatch.setattr(recall, "FILLER", [*recall.FILLER, "another"])
    after = [_key(data, 1024) for data in (with_recall, without)]
    assert after[0] != before[0]
    assert after[1] == before[1]
