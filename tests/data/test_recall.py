"""Claims about the recall documents: solvable from their text, seeded, nothing shared between the splits."""

import json
import random
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from helpers import documents

from nsa_train.config.load import load_config
from nsa_train.data import recall
from nsa_train.data.prepare import _key, prepare
from nsa_train.data.recall import FACT_WEIGHT, KINDS, LONGEST_LINE, WORDS, Haystack, answers, recall_documents
from nsa_train.data.store import TokenStore
from nsa_train.data.tokenizer import Tokenizer, train_tokenizer
from nsa_train.errors import ConfigError, DataError

SPLITS = tuple(WORDS)
TEXT = "\n".join(f"    line {i} of {i % 7} others = {'some ' * (i % 9)}text" for i in range(4000))
HAYSTACK = Haystack([TEXT])


def made(split, documents=80, least=800, most=20_000):
    return list(recall_documents(split, HAYSTACK, documents, least, most))


def told(text, words):
    """What the document says before its questions: values of keys, and variables that are another's."""
    holes = {"{key}": r"(?P<key>[A-Z_]+)", "{value}": "(?P<value>[0-9]+)", "{other}": "(?P<other>[A-Z_]+)"}
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
            key = line.split(" ")[-2]
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
def test_values_are_all_numbers_of_five_digits_alike(split):
    values = [value for d in made(split, 400) for value in told(d.text, WORDS[split])[0].values()]
    assert len(values) > 5000
    assert all(len(value) == 5 for value in values)
    assert len(set(values)) > 0.9 * len(values)
    for place, least in enumerate((1, 0, 0, 0, 0)):
        counts = Counter(value[place] for value in values)
        assert len(counts) == 10 - least
        assert max(counts.values()) < 1.25 * min(counts.values())


def test_a_haystack_gives_lines_that_follow_each_other_from_a_random_one_on():
    lines = TEXT.split("\n")
    draw = random.Random(0)
    starts = set()
    for _ in range(50):
        found = HAYSTACK.lines(draw, 3000)
        assert 3000 - LONGEST_LINE < sum(len(line) + 1 for line in found) <= 3000
        at = lines.index(found[0])
        starts.add(at)
        assert found == (lines + lines)[at : at + len(found)]
    assert len(starts) > 45
    assert Haystack(["a b"]).lines(draw, 9) == ["a b", "a b"]


def test_long_lines_of_a_haystack_are_cut():
    found = Haystack(["x" * 450]).lines(random.Random(0), 500)
    assert sorted(map(len, found)) == [50, 200, 200]


def test_a_haystack_without_text_is_refused():
    with pytest.raises(DataError, match="a haystack without text"):
        Haystack(["", "\n"])


def test_a_haystack_keeps_the_first_characters_of_many(monkeypatch):
    monkeypatch.setattr(recall, "MOST_HAYSTACK", 30)
    texts = iter(["one line\n", "another", "a third line of which a part is left", *["never read"] * 5])
    found = Haystack(texts).lines(random.Random(0), 60)
    assert set(found) == {"one line", "", "another", "a third line o"}
    assert next(texts) == "never read"


def test_needles_stand_in_a_haystack_of_most_of_the_document():
    lines = set(TEXT.split("\n"))
    for document in (d for d in made("train") if d.source == "recall-needle"):
        found = document.text.rstrip("\n").split("\n")
        needles = 2 * len(answers(document.text, WORDS["train"]))  # told and asked for
        assert sum(line in lines for line in found) == len(found) - needles
        assert sum(len(line) + 1 for line in found if line in lines) > 0.5 * len(document.text)


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


def recall_corpus(tmp_path, *words):
    """Facts in the training documents of a source, every line of which tells its document."""
    texts = [{"text": "".join(f"    document {i} says {line}\n" for line in range(40))} for i in range(60)]
    for name, some in (("text", texts), ("copies", texts[:30])):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(text)}\n" for text in some))
    return load_config([
        "data.sources.text={kind: files, paths: [text.jsonl], heldout_share: 0.3}", f"data.root={tmp_path}",
        "data.sources.recall={kind: recall, paths: [train], heldout_paths: [heldout], take: 40, min_chars: 300}",
        "data.sources.recall.max_chars=3000", "data.sources.recall.haystack=[text]", "model.vocab=400",
        f"data.prepared_dir={tmp_path}", "data.workers=1", *words,
    ])  # fmt: skip


def test_as_a_source_each_split_has_the_words_of_its_own(tmp_path):
    config = recall_corpus(tmp_path)
    folder = prepare(config.data, config.model.vocab, lambda line: None)
    for split in SPLITS:
        store = TokenStore.open(folder, split)
        tokenizer = Tokenizer.load(store.tokenizer)
        bounds = np.stack([store.offsets[:-1], store.offsets[1:]], 1)
        mine = bounds[store.sources == store.manifest["sources"].index("recall")].tolist()
        texts = [tokenizer.decode(store.tokens[start:end]) for start, end in mine]
        assert len(texts) == 40
        assert all(answers(text, WORDS[split]) for text in texts)
        assert all(300 <= len(text) <= 3000 for text in texts)


@pytest.mark.parametrize("words", [[], ["data.sources.text.heldout_paths=[copies.jsonl]"]], ids=["by hash", "copies"])
def test_no_text_that_is_held_out_gets_into_a_haystack(words, tmp_path):
    data = recall_corpus(tmp_path, *words).data
    lines = {split: [set(d.text.split("\n")) for d in documents(data, split) if d.source == "text"] for split in SPLITS}
    assert all(len(found) > 10 for found in lines.values())
    hidden = [set(d.text.split("\n")) for split in SPLITS for d in documents(data, split) if d.source == "recall"]
    seen = set().union(*hidden) - {""}
    assert sum(bool(seen & document) for document in lines["train"]) > 20
    assert not any(seen & document - {""} for document in lines["heldout"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.sources.recall.haystack=[]"], "recall: kind=recall hides facts in the text of other sources"),
        (["data.sources.recall.haystack=[text,more]"], "recall: haystack names more, but other sources are text"),
        (["data.sources.recall.haystack=[recall]"], "recall: haystack names recall, but other sources are text"),
        (["data.sources.recall.paths=[test]"], r"kind=recall: paths=\['test'\] must be train or heldout"),
    ],
)
def test_a_haystack_without_sources_and_unknown_words_are_refused(tmp_path, words, message):
    config = recall_corpus(tmp_path, *words)
    with pytest.raises(DataError, match=message):
        prepare(config.data, config.model.vocab, lambda line: None)


def test_a_source_without_sizes_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"kind=recall needs take \(documents\), min_chars and max_chars"):
        recall_corpus(tmp_path, "data.sources.recall.max_chars=null")


def test_a_corpus_of_other_documents_gets_another_folder(monkeypatch):
    with_recall, without = (load_config([f"data={name}"]).data for name in ("stdlib_recall", "stdlib"))
    before = [_key(data, 1024) for data in (with_recall, without)]
    monkeypatch.setattr(recall, "VOWELS", "AEIO")
    after = [_key(data, 1024) for data in (with_recall, without)]
    assert after[0] != before[0]
    assert after[1] == before[1]
