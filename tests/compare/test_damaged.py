"""Files that can be read but hold something else than they should are one message, and nothing is written."""

import json
import lzma

import numpy as np
import pytest
from folders import make_run

from nsa_train.cli import main


def refused(capsys, *words):
    """The one message of a command."""
    assert main(["compare", *map(str, words)]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: [], "its metrics lack training, or the held-out loss after the last step, 6"),
        (lambda rows: rows[:-1], "its metrics lack training, or"),
        (lambda rows: rows[6:], "its metrics lack training, or"),
        (lambda rows: [*rows[:-1], {**rows[-1], "loss": None}], "its metrics lack training, or"),
        (lambda rows: [{"step": 1}, *rows], "its metrics have a row without split"),
        (lambda rows: [{"step": 1, "split": "train"}, *rows], "its metrics have a row without tokens, tokens_per_s"),
    ],
)
def test_a_run_whose_metrics_are_no_longer_whole_is_not_kept(change, said, tmp_path, capsys):
    run = make_run(tmp_path, "nsa")
    metrics, out = run / "metrics.jsonl", tmp_path / "kept"
    rows = change([json.loads(line) for line in metrics.read_text().splitlines()])
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert f"{run}: {said}" in refused(capsys, "keep", run, "--out", out)
    metrics.unlink()
    assert f"{run}: its metrics lack training" in refused(capsys, "keep", run, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("rows", [], "its metrics lack training"),
        ("rows", None, "its metrics have a row without split"),
        ("rows", [3], "its metrics have a row without split"),
        ("manifest", {}, "its manifest says nothing of corpus, rows_fingerprint, initial_weights_sha256, device"),
        ("summary", None, "its summary says nothing of steps, tokens, params_total"),
        ("heldout", 3, "something is missing"),
        ("evaluations", None, "something is missing (evaluations must be a list"),
        ("evaluations", [{"task": "needle"}], "something is missing (evaluations must be a list"),
    ],
)
def test_a_kept_file_that_lacks_something_is_refused_and_stays(part, value, said, tmp_path, capsys):
    run, other = make_run(tmp_path, "nsa"), make_run(tmp_path, "full")
    assert main(["compare", "keep", str(run), "--out", str(tmp_path)]) == 0
    file = tmp_path / "nsa-0.json.xz"
    file.write_bytes(
        lzma.compress(json.dumps({**json.loads(lzma.decompress(file.read_bytes())), part: value}).encode())
    )
    before = file.read_bytes()
    assert f"{file}: {said}" in refused(capsys, file, other, "--out", tmp_path / "out")
    refused(capsys, "keep", run, "--out", tmp_path)
    assert file.read_bytes() == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [{"rows": None}, {"rows": [3]}, {"rows": [{"task": "needle", "length": 9}]}, []])
def test_answers_of_another_form_are_named(content, tmp_path, capsys):
    run, other = make_run(tmp_path, "nsa"), make_run(tmp_path, "full")
    (run / "eval").mkdir()
    (run / "eval" / "needle.json").write_text(json.dumps(content))
    said = refused(capsys, run, other, "--out", tmp_path / "out")
    assert f"{run / 'eval' / 'needle.json'}: no answer of `nsa-train eval` (rows must be a list of objects" in said


def test_held_out_losses_in_another_format_are_named(tmp_path, capsys):
    run = make_run(tmp_path, "nsa")
    with (run / "heldout.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    assert f"{run / 'heldout.npz'}: no held-out losses by document" in refused(capsys, run, run)


@pytest.mark.parametrize(
    ("option", "kind", "row", "said"),
    [
        ("--gates", "gates", 3, "rows must be objects, each with experiment, arm, gate"),
        ("--gates", "gates", {"experiment": "tiny"}, "rows must be objects"),
        ("--gates", "gates", {"experiment": None, "arm": ["nsa"]}, "rows must be objects"),
        ("--rates", "sweep", {"arm": "nsa", "lr": 1e-3, "losses": 3}, "rows without arm, rate and losses"),
        ("--rates", "sweep", {"arm": "nsa", "lr": 1e-3, "losses": {"a": 3}}, "rows without arm, rate and losses"),
        ("--rates", "sweep", {"arm": "nsa", "lr": 1e-3, "losses": {"1": "?"}}, "rows without arm, rate and losses"),
        ("--rates", "sweep", {"arm": "nsa", "lr": 1e-3, "losses": {"1": []}}, "rows without arm, rate and losses"),
        ("--speeds", "training", 3, "has the speed of none of these runs"),
        ("--speeds", "training", {"preset": "tiny", "overrides": None}, "has the speed of none of these runs"),
        ("--speeds", "training", {"preset": "tiny", "attention": "nsa", "T": 512, "gpus": 1, "micro_batch": 4,
                                  "batch_rows": 8, "checkpointing": False, "recomputed": [], "overrides": [],
                                  "tokens_per_s": None, "cuda_graphs": False}, "has the speed of none of these runs"),
    ],
)  # fmt: skip
def test_rows_of_another_form_are_named_with_their_file(option, kind, row, said, tmp_path, capsys):
    runs = [make_run(tmp_path, arm, manifest={"runs_a_device": 2}) for arm in ("full", "nsa")]
    result = {"schema": f"nsa-train/{kind}/1", "rows": [row], "device": {"name": "CPU"}}
    (tmp_path / "odd.json").write_text(json.dumps(result))
    words = [option, tmp_path / "odd.json", "--out", tmp_path / "out"]
    assert f"error: {option} {tmp_path / 'odd.json'}: {said}" in refused(capsys, *runs, *words)
    assert not (tmp_path / "out").exists()
