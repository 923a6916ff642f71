"""The head of a result's file."""

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
    ],
)
def test_the_command_of_a_result_names_no_folders_of_a_machine(monkeypatch, word, told):
    monkeypatch.setattr("sys.argv", ["/data/me/scripts/compare_arms.py", word])
    assert results.command_line().replace("'", "") == f"python compare_arms.py {told}"
