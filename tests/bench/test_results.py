"""The head of a result's file."""

import shlex

import pytest

from nsa_train.bench import results


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
