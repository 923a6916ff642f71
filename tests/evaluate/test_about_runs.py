"""Scripts that question finished runs: what they refuse before a run is questioned, and what they leave of a file."""

import argparse
import json

import pytest

from nsa_train.config.load import load_config, to_yaml
from nsa_train.evaluate.about_runs import about_runs


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Questions runs of these arms; gives the exit code and the runs that were questioned, in turn."""

    def call(*arms, tasks="needle"):
        asked = []
        for arm in arms:
            (tmp_path / arm).mkdir(exist_ok=True)
            (tmp_path / arm / "config.yaml").write_text(to_yaml(load_config([f"attention={arm}"])))
        words = ["script.py", *(str(tmp_path / arm) for arm in arms), "--out", str(tmp_path)]
        monkeypatch.setattr("sys.argv", words)

        def rows(run, config, options):
            asked.append(config.arm)
            return [{"run": str(run), "arm": config.arm, "tasks": options.task}]

        return about_runs("found", argparse.ArgumentParser(), lambda args: [f"task={tasks}"], rows), asked

    return call


def test_a_run_replaces_its_earlier_rows_only(ask, tmp_path):
    assert ask("full", "nsa") == (0, ["full", "nsa"])
    assert ask("nsa") == (0, ["nsa"])
    result = json.loads((tmp_path / "found.json").read_text())
    assert result["schema"] == "nsa-train/found/1"
    assert [row["arm"] for row in result["rows"]] == ["full", "nsa"]


def test_a_task_that_does_not_fit_one_run_is_told_before_any_is_questioned(ask, capsys):
    assert ask("nsa", "full", tasks="blocks") == (2, [])
    assert "is of the arm full, and task=blocks needs a branch that selects blocks" in capsys.readouterr().err


def test_a_damaged_file_is_told_before_any_run_is_questioned(ask, tmp_path, capsys):
    (tmp_path / "found.json").write_text("{")
    assert ask("nsa") == (2, [])
    assert "found.json: no earlier results" in capsys.readouterr().err
