"""Claims about documents: what is read, how it is split, and what a bad input is told."""

import gzip
import json
import re
from collections import Counter

import pyarrow
import pytest
import zstandard
from helpers import documents
from pyarrow import ipc, parquet

from nsa_train.config.load import load_config
from nsa_train.data.selection import SPLITS, Selection, select
from nsa_train.errors import DataError


def write_jsonl(path, texts, **fields):
    path.write_text("".join(json.dumps({"text": text} | fields) + "\n" for text in texts))


def write_arrow(path, table, new=ipc.new_stream):
    with new(str(path), table.schema) as writer:
        writer.write_table(table)


def texts_of(data, split):
    return [document.text for document in documents(data, split)]


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
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
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "from gz') + gzip.compress(b'ip"}') + bytes(512))
    write_arrow(folder / "f.arrow", pyarrow.table({"text": ["from a stream"], "title": ["s"]}))
    write_arrow(folder / "g.arrow", pyarrow.table({"text": ["from a file"], "license": ["MIT"]}), ipc.new_file)
    write_jsonl(folder / "h.NDJSON", ["from lines"])
    (folder / ".hidden").write_bytes(b"\xff")
    (tmp_path / "held.txt").write_text("held")
    data = data_config(paths=("many",), heldout_paths=("held.txt",))
    assert [(d.text, d.source, d.title) for d in documents(data, "train")] == [
        ("from jsonl\u00e9", "a", "named"),
        ("from zstd 0", "given", "many/deep/b.jsonl.zst:1"),
        ("from zstd 1", "given", "many/deep/b.jsonl.zst:2"),
        ("from parquet", "c", "many/deep/c.parquet: row 1"),
        ("from text\r\n中文", "d", "many/deep/d.txt"),
        ("from gzip", "e", "many/deep/e.jsonl.gz:1"),
        ("from a stream", "f", "s"),
        ("from a file", "g", "many/deep/g.arrow: row 1"),
        ("from lines", "h", "many/deep/h.NDJSON:1"),
    ]


GOOD = b'{"text": "fine"}\n'
BAD_FILES = [
    ("x.jsonl", GOOD + b"\n{oops\n", r"^x\.jsonl:3: not JSON \("),
    ("x.jsonl", GOOD + b'{"body": 1, "id": 2}\n', r"^x\.jsonl:2: no field 'text', only body, id; set data\.text_field"),
    ("x.jsonl", GOOD + b'["text"]\n', r"^x\.jsonl:2: a JSON list"),
    ("x.jsonl", GOOD + b'{"text": 5}', r"^x\.jsonl:2: field 'text' is a int"),
    ("x.jsonl", GOOD + b'{"text": "\xff"}\n', r"^x\.jsonl:2: not UTF-8 \(byte 10"),
    ("x.jsonl", GOOD + b'{"text": "a\\ud800"}\n', r"^x\.jsonl:2: not UTF-8 .*character 1 of the text .*surrogate"),
    (
        "x.jsonl",
        GOOD + b'{"text": "a", "source": "\\ud800"}\n',
        r"^x\.jsonl:2: not UTF-8 .*0 of the source ",
    ),
    ("x.jsonl", GOOD + b'{"text": "a", "license": "MI\\ud800"}\n', r"^x\.jsonl:2: not UTF-8 .*2 of the licence "),
    ("x.jsonl.zst", zstandard.compress(GOOD) + zstandard.compress(b"{oops"), r"^x\.jsonl\.zst:2: not JSON"),
    ("x.jsonl.zst", zstandard.compress(GOOD)[:-3], r"^x\.jsonl\.zst: ends inside its zst data"),
    ("x.jsonl.zst", GOOD, r"^x\.jsonl\.zst: not zst"),
    ("x.jsonl.gz", gzip.compress(GOOD)[:-9], r"^x\.jsonl\.gz: ends inside its gz data"),
    ("x.jsonl.gz", GOOD, r"^x\.jsonl\.gz: not gz"),
    ("x.parquet", GOOD, r"^x\.parquet: not parquet"),
    ("x.arrow", GOOD, r"^x\.arrow: not arrow"),
    ("x.txt", b"one\ntwo\n\xff", r"^x\.txt:3: not UTF-8 \(byte 8 of the file\)"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_a_bad_file_is_named_with_its_line_and_problem(name, content, message, data_config, tmp_path):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "held.txt").write_text("held")
    with pytest.raises(DataError, match=message + r"(.|\n)*data\.on_error=skip leaves it out$"):
        texts_of(data_config(paths=(name,), heldout_paths=("held.txt",)), "train")


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_input_can_be_left_out_and_is_counted(name, content, message, data_config, tmp_path):
    (tmp_path / name).write_bytes(content)
    write_jsonl(tmp_path / "y.jsonl", ["behind"])
    (tmp_path / "held.txt").write_text("held")
    selection = select(data_config(paths=(name, "y.jsonl"), heldout_paths=("held.txt",), on_error="skip"))
    assert selection.left_out == {"broken": 1}
    assert len(selection.broken) == 1
    assert re.search(message, selection.broken[0])
    texts = texts_of(data_config(paths=(name, "y.jsonl"), heldout_paths=("held.txt",), on_error="skip"), "train")
    assert texts[-1] == "behind"


def test_a_broken_record_costs_only_itself(data_config, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(GOOD + b"{oops\n" * 30 + b'{"text": "after"}\n')
    (tmp_path / "held.txt").write_text("held")
    data = data_config(paths=("x.jsonl",), heldout_paths=("held.txt",), on_error="skip")
    assert texts_of(data, "train") == ["fine", "after"]
    selection = select(data)
    assert selection.left_out["broken"] == 30
    assert len(selection.broken) == 20  # messages that are kept


def test_a_cut_parquet_or_arrow_file_is_no_shorter_file(data_config, tmp_path):
    table = pyarrow.table({"text": [f"text {i}" * 50 for i in range(2000)]})
    parquet.write_table(table, tmp_path / "x.parquet")
    write_arrow(tmp_path / "x.arrow", table)
    (tmp_path / "held.txt").write_text("held")
    for name in ("x.parquet", "x.arrow"):
        content = (tmp_path / name).read_bytes()
        for length in (len(content) // 2, len(content) - 8):
            (tmp_path / name).write_bytes(content[:length])
            with pytest.raises(DataError, match=rf"^{re.escape(name)}: (not |cannot be read|ends)"):
                texts_of(data_config(paths=(name,), heldout_paths=("held.txt",)), "train")


def test_a_parquet_file_without_the_text_column_names_its_columns(data_config, tmp_path):
    parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: no field 'text', only body, id; set data\.text_field"):
        texts_of(data_config(paths=("x.parquet",)), "train")


@pytest.mark.parametrize("columns", [["text", "text", "id"], ["text", "source", "source"]])
def test_a_column_that_is_there_twice_is_named(columns, data_config, tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=columns)
    parquet.write_table(table, tmp_path / "x.parquet")
    write_arrow(tmp_path / "x.arrow", table)
    for name in ("x.parquet", "x.arrow"):
        with pytest.raises(DataError, match=rf"^{re.escape(name)}: 2 columns are called '{columns[1]}'; rename all"):
            texts_of(data_config(paths=(name,)), "train")


def test_a_missing_path_is_named(data_config, tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        texts_of(data_config(paths=("nowhere.jsonl",)), "train")


def test_a_link_out_of_the_root_is_refused(data_config, tmp_path):
    (tmp_path / "secret.txt").write_text("outside")
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (root / "folder" / "x.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(DataError, match=r"x\.txt: links to .*secret\.txt, outside data\.root"):
        texts_of(data_config(root=str(root), paths=("folder",)), "train")


def test_filters_leave_out_by_length_and_language_and_count_it(data_config, tmp_path):
    records = [("short", "en"), ("long enough", "en"), ("lang genug", "de"), ("much too long for us", "en"), ("", "en")]
    lines = (json.dumps({"text": text, "lang": language}) for text, language in records)
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": "held out", "lang": "en"}))
    fields = {"heldout_paths": ("held.jsonl",), "language_field": "lang", "languages": ("en",)}
    data = data_config(min_chars=6, max_chars=15, **fields)
    assert texts_of(data, "train") == ["long enough"]
    assert select(data).left_out == {"empty": 1, "language": 1, "too long": 1, "too short": 1}
    (tmp_path / "corpus.jsonl").write_text('{"text": "nothing said"}')
    with pytest.raises(DataError, match=r"corpus\.jsonl:1: no field 'lang', only text; .*data\.language_field"):
        texts_of(data, "train")


def named(tmp_path, *overrides):
    places = [f"data.root={tmp_path}", f"data.prepared_dir={tmp_path}/prepared"]
    return load_config(["data=files", *places, *overrides]).data


def test_named_sources_share_what_they_do_not_say_and_keep_their_names(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three", "four"], source="ignored")
    write_jsonl(tmp_path / "b.jsonl", ["four", "five"], licence="MIT")
    (tmp_path / "held.txt").write_text("held")
    data = named(tmp_path, "data.heldout_share=0.4", "data.licence=CC0-1.0", "data.sources.first.paths=[a.jsonl]",
                 "data.sources.second={paths: [b.jsonl], heldout_paths: [held.txt]}")  # fmt: skip
    selection = select(data)
    found = {(d.source, d.text, d.licence) for split in SPLITS for d in documents(data, split)}
    assert {text for name, text, _ in found if name == "first"} >= {"one", "two", "three"}
    assert {("second", "five", "MIT"), ("second", "held", "CC0-1.0")} <= found
    assert len(found) == 6  # "four" stays once
    assert selection.left_out == {"duplicate": 1}
    held = {d.source for d in documents(data, "heldout")}
    assert held == {"first", "second"}


def test_every_source_gets_a_heldout_document_where_it_has_two(tmp_path):
    for name, texts in {"a": "pqrstuvwxyz", "b": "12", "c": "!"}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", list(texts))
    data = named(tmp_path, "data.heldout_share=1e-9", *(f"data.sources.{n}.paths=[{n}.jsonl]" for n in "abc"))
    assert Counter(d.source for d in documents(data, "heldout")) == {"a": 1, "b": 1}


def test_near_duplicates_are_left_out_and_equal_ones_counted_apart(data_config, tmp_path, module_texts):
    texts = list(module_texts.values())
    near = [text.replace("self", "me", 3) + "# a line more\n" for text in texts[:4]]
    write_jsonl(tmp_path / "corpus.jsonl", [*texts, *near, texts[0]])
    (tmp_path / "held.txt").write_text("something that is nowhere else in the whole corpus of modules")
    data = data_config(heldout_paths=("held.txt",), near_duplicates=0.7)
    assert texts_of(data, "train") == texts
    assert select(data).left_out == {"duplicate": 1, "near duplicate": 4}
    assert len(texts_of(data_config(heldout_paths=("held.txt",)), "train")) == len(texts) + 4


def test_a_text_in_two_sources_stays_in_one_split_whatever_is_near(tmp_path, module_texts):
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", list(module_texts.values()))
    sources = ("data.sources.a={paths: [a.jsonl], heldout_share: 1.0e-9}",
               "data.sources.b={paths: [b.jsonl], heldout_share: 0.999999999}")  # fmt: skip
    data = named(tmp_path, *sources, "data.near_duplicates=0.9")
    found = [document.text for split in SPLITS for document in documents(data, split)]
    assert Counter(found) == Counter(module_texts.values())


def test_a_near_copy_that_two_sources_hold_is_no_held_out_text(tmp_path, module_texts):
    """Of equal texts the held-out one stays; here it is like one that trains, as the other source's is."""
    texts = list(module_texts.values())
    near = texts[0].replace("self", "me", 3) + "# a line more\n"
    write_jsonl(tmp_path / "a.jsonl", [*texts[:4], near])
    write_jsonl(tmp_path / "b.jsonl", [*texts[4:], near])
    sources = ("data.sources.a={paths: [a.jsonl], heldout_share: 1.0e-9}",
               "data.sources.b={paths: [b.jsonl], heldout_share: 0.999999999}")  # fmt: skip
    data = named(tmp_path, *sources, "data.near_duplicates=0.7")
    assert select(data).left_out == {"duplicate": 1, "near duplicate": 1}
    assert near not in [document.text for split in SPLITS for document in documents(data, split)]


def test_a_data_set_is_read_by_its_name_as_a_stream(data_config, tmp_path, module_texts):
    folder = tmp_path / "owner" / "set"
    folder.mkdir(parents=True)
    texts = list(module_texts.values())
    parquet.write_table(pyarrow.table({"body": texts, "license": ["PSF-2.0"] * len(texts)}), folder / "train.parquet")
    data = data_config(kind="hub", paths=("owner/set",), text_field="body", take=10, heldout_share=0.3)
    found = [document for split in SPLITS for document in documents(data, split)]
    assert Counter(document.text for document in found) == Counter(texts[:10])
    assert {(document.source, document.licence) for document in found} == {("set", "PSF-2.0")}


def test_a_folder_of_a_data_set_can_be_chosen(data_config, tmp_path):
    for name in ("c", "python"):
        folder = tmp_path / "owner" / "set" / "data" / name
        folder.mkdir(parents=True)
        write_jsonl(folder / "train.jsonl", [f"{name} one", f"{name} two"], license=["MIT"])
    data = data_config(kind="hub", paths=("owner/set",), subset="data/python", licence="per file")
    found = [document for split in SPLITS for document in documents(data, split)]
    assert {(d.text, d.licence) for d in found} == {("python one", "per file"), ("python two", "per file")}


def test_a_data_set_that_is_not_there_is_named(data_config):
    with pytest.raises(DataError, match=r"nobody/nothing: cannot be read as a data set"):
        texts_of(data_config(kind="hub", paths=("nobody/nothing",)), "train")


def test_a_selection_survives_its_file(data_config, tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", ["a", "b", "a", ""], licence="MIT")
    before = select(data_config())
    before.save(tmp_path / "selection")
    after = Selection.load(tmp_path / "selection")
    for key, value in vars(before).items():
        assert (value == getattr(after, key)).all() if hasattr(value, "all") else value == getattr(after, key)
