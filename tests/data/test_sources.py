"""Claims about documents: what is read, how it is split, and what a bad input is told."""

import json
import re
from collections import Counter

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from nsa_train.data.sources import SPLITS, documents
from nsa_train.errors import DataError


def write_jsonl(path, texts, **fields):
    path.write_text("".join(json.dumps({"text": text} | fields) + "\n" for text in texts))


def texts_of(data, split):
    return [document.text for document in documents(data, split)]


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    from nsa_train.config.load import load_config

    data = load_config(["experiment=tiny"]).data
    return {split: list(documents(data, split)) for split in SPLITS}


def test_stdlib_is_one_long_document_per_package_without_tests_and_tables(stdlib):
    found = {document.title: document.text for split in SPLITS for document in stdlib[split]}
    assert {"asyncio", "argparse", "pydoc_data.topics"} <= found.keys()
    assert found.keys().isdisjoint({"encodings", "idlelib", "lib2to3", "turtledemo", "ensurepip", "test"})
    assert re.findall(r"^# asyncio/\w+\.py$", found["asyncio"], re.M)[:2] == [
        "# asyncio/__init__.py",
        "# asyncio/__main__.py",
    ]
    assert not any(re.search(r"^# (\S*/)?(tests?/|test_)\S*\.py$", text, re.M) for text in found.values())
    assert 7e6 < sum(len(text) for text in found.values()) < 12e6
    assert {document.source for split in SPLITS for document in stdlib[split]} == {"stdlib"}


def test_heldout_documents_are_never_in_train_and_nothing_is_lost(data_config, tmp_path, module_texts):
    write_jsonl(tmp_path / "corpus.jsonl", module_texts.values())
    data = data_config(heldout_share=0.3)
    train, heldout = texts_of(data, "train"), texts_of(data, "heldout")
    assert train
    assert heldout
    assert Counter(train + heldout) == Counter(module_texts.values())
    assert train == texts_of(data, "train")


@pytest.mark.parametrize("share", [1e-15, 1 - 1e-15])
def test_either_split_gets_a_document_however_small_its_share(share, data_config, tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", ["one", "two", "three"])
    data = data_config(heldout_share=share)
    assert sorted((len(texts_of(data, "train")), len(texts_of(data, "heldout")))) == [1, 2]


def test_a_single_document_cannot_be_split(data_config, tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", ["alone", "alone"])
    with pytest.raises(DataError, match=r"single document.*data\.heldout_paths"):
        texts_of(data_config(), "train")


def test_duplicates_are_dropped_and_train_leaves_out_what_is_held_out(data_config, tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", ["a", "b", "a", "c", "", "b"])
    write_jsonl(tmp_path / "held.jsonl", ["c", "d", "c"])
    data = data_config(heldout_paths=("held.jsonl",))
    assert texts_of(data, "train") == ["a", "b"]
    assert texts_of(data, "heldout") == ["c", "d"]


def test_every_kind_of_file_below_a_folder_is_read_in_sorted_order(data_config, tmp_path):
    folder = tmp_path / "many" / "deep"
    folder.mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", ["from jsonl\u00e9"], title="named")
    lines = b"".join(json.dumps({"text": f"from zstd {i}", "source": "given"}).encode() + b"\n" for i in range(2))
    frames = zstandard.compress(lines[:30]) + zstandard.compress(lines[30:])
    (folder / "b.jsonl.zst").write_bytes(frames)
    parquet.write_table(pyarrow.table({"text": ["from parquet", None], "other": [1, 2]}), folder / "c.parquet")
    (folder / "d.txt").write_bytes("from text\r\n中文".encode())
    (folder / ".hidden").write_bytes(b"\xff")
    (tmp_path / "held.txt").write_text("held")
    data = data_config(paths=("many",), heldout_paths=("held.txt",))
    assert [(d.text, d.source, d.title) for d in documents(data, "train")] == [
        ("from jsonl\u00e9", "a", "named"),
        ("from zstd 0", "given", "many/deep/b.jsonl.zst:1"),
        ("from zstd 1", "given", "many/deep/b.jsonl.zst:2"),
        ("from parquet", "c", "many/deep/c.parquet: row 1"),
        ("from text\r\n中文", "d", "many/deep/d.txt"),
    ]


GOOD = b'{"text": "fine"}\n'
BAD_FILES = [
    ("x.jsonl", GOOD + b"\n{oops\n", r"^x\.jsonl:3: not JSON \("),
    ("x.jsonl", GOOD + b'{"body": 1, "id": 2}\n', r"^x\.jsonl:2: no field 'text', only body, id; set data\.text_field"),
    ("x.jsonl", GOOD + b'["text"]\n', r"^x\.jsonl:2: a JSON list"),
    ("x.jsonl", GOOD + b'{"text": 5}', r"^x\.jsonl:2: field 'text' is a int"),
    ("x.jsonl", GOOD + b'{"text": "\xff"}\n', r"^x\.jsonl:2: not UTF-8 \(byte 10"),
    ("x.jsonl", GOOD + b'{"text": "a\\ud800"}\n', r"^x\.jsonl:2: not UTF-8 .*character 1 .*surrogate"),
    ("x.jsonl.zst", zstandard.compress(GOOD) + zstandard.compress(b"{oops"), r"^x\.jsonl\.zst:2: not JSON"),
    ("x.jsonl.zst", zstandard.compress(GOOD)[:-3], r"^x\.jsonl\.zst: ends inside a zstd frame"),
    ("x.jsonl.zst", GOOD, r"^x\.jsonl\.zst: not zstd"),
    ("x.parquet", GOOD, r"^x\.parquet: not parquet"),
    ("x.txt", b"one\ntwo\n\xff", r"^x\.txt:3: not UTF-8 \(byte 8 of the file\)"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_a_bad_file_is_named_with_its_line_and_problem(name, content, message, data_config, tmp_path):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "held.txt").write_text("held")
    with pytest.raises(DataError, match=message):
        texts_of(data_config(paths=(name,), heldout_paths=("held.txt",)), "train")


def test_a_parquet_file_without_the_text_column_names_its_columns(data_config, tmp_path):
    parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: no field 'text', only body, id; set data\.text_field"):
        texts_of(data_config(paths=("x.parquet",)), "train")


def test_a_missing_path_is_named(data_config, tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        texts_of(data_config(paths=("nowhere.jsonl",)), "train")
