"""The text and the command of scripts/learn_copies.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import load_script

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "learn_copies.py"


@pytest.fixture
def script(monkeypatch):
    return load_script("learn_copies", monkeypatch)


def test_what_counts_as_copied_stood_in_the_row_behind_the_same_two_tokens(script):
    batch = script.Text(seed=3).batch()
    tokens, labels, copied = (x.view(script.ROWS, script.TOKENS).tolist() for x in batch)
    counted = 0
    for row, wanted, marks in zip(tokens, labels, copied, strict=True):
        assert wanted == [*row[1:], -100]
        for t in range(script.TOKENS):
            if marks[t]:
                ending = (row[t - 1], row[t], wanted[t])
                assert any(tuple(row[s : s + 3]) == ending for s in range(t - 1)), f"token {t} of {row}"
                counted += 1
    assert counted > 0.5 * script.ROWS * script.TOKENS


def test_all_variants_of_a_seed_read_the_same_text_and_another_seed_another(script):
    one, same, other = (script.Text(seed).batch() for seed in (1, 1, 2))
    assert torch.equal(one.tokens, same.tokens)
    assert not torch.equal(one.tokens, other.tokens)


def test_a_result_has_a_row_for_each_variant_and_a_figure(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.results, "RESULTS", tmp_path)
    monkeypatch.setattr(script, "EVERY", 1)
    variants = ["full:trainer.steps=2", "nsa:trainer.steps=2,attention.gate_scale=1"]
    monkeypatch.setattr(sys, "argv", ["learn_copies.py", *variants])
    assert script.main() == 0
    rows = json.loads((tmp_path / "copies_cpu.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == variants
    assert [point["step"] for point in rows[1]["curve"]] == [1, 2]
    assert set(rows[1]["curve"][0]["gates"][0]) == {"cmp", "slc", "win"}
    assert rows[0]["curve"][0]["gates"] == []
    assert (tmp_path / "copies_cpu.png").stat().st_size > 10_000


def test_a_wrong_variant_is_named_before_any_is_trained():
    command = [sys.executable, str(SCRIPT), "full", "nsa:attention.gate_scale=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "attention.gate_scale=0.0 must be positive" in done.stderr
