"""The gates before a comparison pass for sound arms, and turn red for planted faults."""

import json
import math
from functools import partial

import pytest
import torch
from launch import SMALL, Job

from nsa_train.compare.gates import GATES, Subject
from nsa_train.config.load import load_config
from nsa_train.ops import reference

TRAINED = ("first steps of slc as of full", "one batch by heart", "random tokens")


def find(gate, *overrides):
    return GATES[gate](Subject(load_config([*SMALL, *overrides]), torch.device("cpu"), 0))


def leak(steps, module="nsa_train.ops.reference"):
    """Compressed blocks are seen `steps` tokens before they end."""
    import importlib

    place = importlib.import_module(module)
    sound = place.cmp_visible

    def early(L, spec, device=None):
        t = torch.arange(L, device=device)
        last = torch.arange(reference.compressed_length(L, spec), device=device) * spec.cmp_stride + spec.cmp_block - 1
        return last - steps <= t[:, None]

    place.cmp_visible = early
    return sound


@pytest.fixture
def leaking():
    sound = leak(1)
    yield
    reference.cmp_visible = sound


@pytest.mark.parametrize("gate", ["future change", "gradient from later tokens"])
@pytest.mark.parametrize("arm", ["nsa", "full", "window", "nsa_no_win"])
def test_no_arm_sees_the_future(gate, arm):
    assert find(gate, f"attention={arm}").passed


@pytest.mark.parametrize("gate", ["future change", "gradient from later tokens"])
@pytest.mark.parametrize("arm", ["nsa", "nsa_no_slc"])
@pytest.mark.usefixtures("leaking")
def test_a_compressed_block_that_is_seen_a_token_early_is_found(gate, arm):
    finding = find(gate, f"attention={arm}")
    assert not finding.passed, finding
    assert find(gate, "attention=full").passed


def test_an_initial_loss_far_from_a_guess_is_found():
    assert find("initial loss").passed
    assert find("initial loss", "model.width=256").passed  # whose random logits add 0.05 nats
    assert not find("initial loss", "model.init_std=0.5").passed


@pytest.mark.parametrize("arm", ["nsa", "nsa_shared_kv", "nsa_random"])
@pytest.mark.parametrize("gate", ["slc is full up to n l' tokens", "win is full up to w tokens"])
def test_branches_that_see_all_are_full_attention(gate, arm):
    assert find(gate, f"attention={arm}").passed


def test_a_window_that_misses_a_token_is_found(monkeypatch):
    sound = reference.win_visible
    monkeypatch.setattr(reference, "win_visible", lambda L, w, device=None: sound(L, w - 1, device))
    assert not find("win is full up to w tokens").passed
    assert find("slc is full up to n l' tokens").passed


def test_a_gate_about_a_branch_is_silent_where_there_is_none():
    for gate in ("slc is full up to n l' tokens", "win is full up to w tokens", TRAINED[0]):
        assert find(gate, "attention=full_gated") is None


@pytest.mark.parametrize("lost", [0, 1], ids=["slc", "full"])
def test_losses_that_are_no_numbers_are_not_equal(lost, monkeypatch):
    curves = [[6.0, 5.0, 4.0], [6.0, 5.0, 4.0]]
    monkeypatch.setattr(Subject, "train", lambda self, model, batches, rates: iter(curves.pop()))
    assert find("first steps of slc as of full").passed
    curves[:] = [[6.0, 5.0, 4.0], [6.0, 5.0, 4.0]]
    curves[lost][1] = math.nan
    assert not find("first steps of slc as of full").passed


@pytest.mark.process
def test_the_command_trains_and_writes_its_findings(tmp_path):
    words = ["compare", "gates", "--arms", "nsa", "--steps", "3", "--out", tmp_path, "--set", *SMALL, "optim.lr=1e-2"]
    job = Job(words, tmp_path / "output")
    assert job.wait() == 1, job.text
    result = json.loads((tmp_path / "gates_tiny.json").read_text())
    assert result["schema"] == "nsa-train/gates/1"
    assert {row["gate"] for row in result["rows"]} == set(GATES)
    assert [row["gate"] for row in result["rows"] if not row["passed"]] == ["random tokens"]
    assert "3 steps, too few to tell" in result["rows"][-1]["found"]
    words[words.index("nsa")] = "window"
    assert Job(words, tmp_path / "output").wait() == 1
    after = json.loads((tmp_path / "gates_tiny.json").read_text())["rows"]
    assert after[: len(result["rows"])] == result["rows"]
    assert {row["arm"] for row in after[len(result["rows"]) :]} == {"window"}


def lose_a_block():
    sound = reference.select_blocks

    def lossy(scores, spec):
        blocks = sound(scores, spec)
        return torch.where(blocks == 1, -1, blocks)

    reference.select_blocks = lossy


@pytest.mark.process
def test_a_block_that_is_never_read_is_found_with_and_without_training(tmp_path):
    words = ["compare", "gates", "--arms", "nsa", "--steps", "1", "--out", tmp_path, "--name", "lossy", "--set", *SMALL]
    job = Job(words, tmp_path / "output", before=lose_a_block)
    assert job.wait() == 1, job.text
    passed = {row["gate"]: row["passed"] for row in json.loads((tmp_path / "gates_lossy.json").read_text())["rows"]}
    assert passed["win is full up to w tokens"]
    assert not passed["slc is full up to n l' tokens"]
    assert not passed["first steps of slc as of full"]


@pytest.mark.process
def test_random_tokens_are_predicted_through_a_leak(tmp_path):
    """A block of four tokens is seen four tokens early: its mean tells of the next one."""
    small = [*SMALL, "model.vocab=300", "optim.lr=1e-2", "attention.cmp_block=4", "attention.cmp_stride=2"]
    words = ["compare", "gates", "--arms", "nsa", "--steps", "120", "--out", tmp_path, "--set", *small]
    job = Job(words, tmp_path / "output", before=partial(leak, 3))
    assert job.wait() == 1, job.text
    rows = {row["gate"]: row for row in json.loads((tmp_path / "gates_tiny.json").read_text())["rows"]}
    assert float(rows["random tokens"]["found"].split()[2]) < -0.02
    assert not rows["future change"]["passed"]
