"""The head of a result's file."""

import shlex

import pytest

from nsa_train.bench import results
from nsa_train.errors import NsaTrainError


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("/data/me/corpus.json", "corpus.json"),
        ("--out=/tmp/report", "--out=report"),
        ("data.paths=[/data/a,b/c,/d]", "data.paths=[a,b/c,d]"),
        ("docs/results/runs/r1-*.json.xz", "docs/results/runs/r1-*.json.xz"),
        ("batch=1/2", "batch=1/2"),
        ("data.paths=[/data/a, /data/b/c]", "data.paths=[a, c]"),
        ("data.paths=['/data/a b/c']", "data.paths=['c']"),
        ("data.sources={a:/data/b}", "data.sources={a:b}"),
        ("file:/data/a", "file:a"),
        ("https://host/a", "https://host/a"),
    ],
)
def test_the_command_of_a_result_names_no_folders_of_a_machine(monkeypatch, word, told):
    monkeypatch.setattr("sys.argv", ["/data/me/scripts/compare_arms.py", word])
    assert shlex.split(results.command_line()) == ["python", "compare_arms.py", told]


def test_what_was_written_is_read_and_nothing_of_another_kind(tmp_path):
    path = results.write_result("lr", "sweep", [{"arm": "nsa"}], folder=tmp_path)
    assert results.read_result(path, "sweep", "--rates", "a sweep")["rows"] == [{"arm": "nsa"}]
    with pytest.raises(NsaTrainError, match=r"--gates .*lr\.json: no result of gates .*sweep/1, not nsa-train/gates/1"):
        results.read_result(path, "gates", "--gates", "gates")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"1", b"\xff", b'{"schema": "nsa-train/sweep/1"}',
                                     b'{"schema": "nsa-train/sweep/1", "rows": 1}'])  # fmt: skip
def test_a_file_without_rows_is_no_result(content, tmp_path):
    (tmp_path / "lr.json").write_bytes(content)
    with pytest.raises(NsaTrainError, match=r"--rates .*lr\.json: no result of a sweep"):
        results.read_result(tmp_path / "lr.json", "sweep", "--rates", "a sweep")


def test_a_folder_in_place_of_a_result_is_told(tmp_path):
    with pytest.raises(NsaTrainError, match=r"--rates .*: cannot be read \(Is a directory\)"):
        results.read_result(tmp_path, "sweep", "--rates", "a sweep")
