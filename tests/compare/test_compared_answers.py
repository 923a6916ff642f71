"""What `nsa-train eval` asked of the runs stands in the report."""

import json

from folders import compared, make_run

from nsa_train.cli import main

OF_TODAY = {"settings": {"corpus_hash": "c"}}
HELDOUT_ROW = {"what": "summary", "task": "heldout", **OF_TODAY}


def test_answers_of_the_runs_stand_in_the_report(tmp_path):
    runs = [make_run(tmp_path, arm) for arm in ("full", "nsa")]
    for run, held in zip(runs, (None, 0.25), strict=True):
        cell = {"what": "cell", "task": "needle", "length": 512, "depth": 0.5, "zone": None, "accuracy": 0.0}
        found = {
            "what": "summary",
            "task": "needle",
            "length": 512,
            "accuracy": 0.5,
            "loss": 1.25,
            "selection_recall": held,
            "samples": 40 if held else 42,
            **OF_TODAY,
        }
        nothing = {"what": "summary", "task": "needle", "length": 64, "cells": 0, "samples": 0, **OF_TODAY}
        (run / "eval").mkdir()
        (run / "eval" / "needle.json").write_text(json.dumps({"rows": [cell, found, nothing]}))
    (runs[1] / "eval" / "heldout.json").write_text(
        json.dumps({"rows": [HELDOUT_ROW | {"length": 1024, "loss": 4.5, "by_position": {}}]})
    )
    _, text = compared(tmp_path / "out", runs)
    for line in (
        "| heldout | 1,024 | - | - | 4.5000 |",
        "| needle | 64 | - | - | - |",
        "| needle | 512 | 40 | 50.0% (1.25) | 50.0% (1.25; 25%) |",
    ):
        assert line in text


def test_answers_by_depth_and_losses_by_position_stand_in_the_report(tmp_path):
    runs = [make_run(tmp_path, arm, seed) for arm in ("full", "nsa") for seed in (0, 1)]
    for run, right, zone in zip(runs, (0.25, 0.75, 1.0, 0.5), (None, "window", None, None), strict=True):
        (run / "eval").mkdir()
        cells = [
            {"what": "cell", "task": "needle", "length": length, "depth": depth, "accuracy": right, "zone": zone}
            for length, depth in ((512, 0.0), (512, 1.0), (1024, 0.0))
        ]
        told = {"what": "summary", "task": "needle", "length": 512, "accuracy": right, "loss": 1.0,
                "selection_recall": None, **OF_TODAY}  # fmt: skip
        (run / "eval" / "needle.json").write_text(json.dumps({"rows": [*cells, told]}))
        losses = [
            HELDOUT_ROW | {"length": length, "loss": 4.0, "by_position": by_position}
            for length, by_position in (
                (512, {"0-128": right, "128-512": 2.0}),
                (1024, {"0-128": 3.0, "512-1024": None}),
            )
        ]
        (run / "eval" / "heldout.json").write_text(json.dumps({"rows": losses}))
    rows, said = compared(tmp_path / "out", runs)
    for line in (
        "![answers to needle, by length and depth](comparison_tiny_needle.png)",
        "| tokens of a row | arm | 0-128 | 128-512 | 512-1024 |",
        "| 512 | `full` | 0.5000 | 2.0000 | - |",
        "| 1,024 | `nsa` | 3.0000 | - | - |",
    ):
        assert line in said
    assert (tmp_path / "out" / "comparison_tiny_needle.png").read_bytes()[:4] == b"\x89PNG"
    grids = {row["arm"]: row["cells"] for row in rows if row["what"] == "grid"}
    assert [(cell["length"], cell["depth"]) for cell in grids["nsa"]] == [(512, 0.0), (512, 1.0), (1024, 0.0)]
    told = {arm: (cells[0]["accuracy"], cells[0]["zone"]) for arm, cells in grids.items()}
    assert told == {"full": (0.25, None), "nsa": (0.75, None)}


def test_answers_that_were_asked_in_other_ways_are_told(tmp_path):
    runs = [make_run(tmp_path, arm) for arm in ("full", "nsa")]
    for run, samples in zip(runs, (1, 2), strict=True):
        (run / "eval").mkdir()
        for task, settings in (("needle", {"corpus_hash": "c", "samples": samples}), ("mqar", {"corpus_hash": "c"})):
            row = {"what": "summary", "task": task, "length": 512, "accuracy": 0.5, "loss": 1.0, "settings": settings}
            (run / "eval" / f"{task}.json").write_text(json.dumps({"rows": [row | {"selection_recall": None}]}))
    _, said = compared(tmp_path / "out", runs)
    assert "**Not all runs were asked alike**, with other samples or depths: needle.\n" in said


def test_answers_of_before_they_named_the_corpus_are_left_out(tmp_path):
    runs = [make_run(tmp_path, arm) for arm in ("full", "nsa")]
    (runs[1] / "eval").mkdir()
    for task in ("needle", "heldout"):
        rows = [{"what": "cell", "task": task, "length": 512, "depth": 0.0, "accuracy": 1.0, "zone": None},
                {"what": "summary", "task": task, "length": 512, "accuracy": 1.0, "settings": {}}]  # fmt: skip
        (runs[1] / "eval" / f"{task}.json").write_text(json.dumps({"rows": rows}))
    rows, _ = compared(tmp_path / "out", runs)
    assert not {"eval", "grid"} & {row["what"] for row in rows}


def test_selection_and_maps_of_the_runs_stand_in_the_report(tmp_path):
    runs = [make_run(tmp_path, arm, seed) for arm in ("full", "nsa") for seed in (0, 1)]
    for run in runs:
        (run / "eval").mkdir()
    for run, recall in zip(runs[2:], (0.75, 0.85), strict=True):
        whole = {
            "what": "selection", "task": "blocks", "length": 512, "selection_recall": recall, "best_recall": 0.9,
            "random_recall": 0.25, "forced_recall": 0.125, "distinct_blocks": {"2": 9.0, "4": 10.5, "8": 12.25},
            "neighbour_overlap": 0.875, "distance": {},
        }  # fmt: skip
        heads = [
            {**whole, "what": "head", "length": length, "layer": layer, "kv_head": head,
             "selection_recall": recall - layer / 4 + head / 10 if length == 512 else 0.0}
            for length in (256, 512, 4096) for layer in (0, 1) for head in (0, 1)
        ]  # fmt: skip
        (run / "eval" / "blocks.json").write_text(json.dumps({"rows": [whole, *heads]}))
    for run in (runs[0], runs[3]):
        (run / "eval" / "maps.png").write_text(run.name)
        (run / "eval" / "maps.json").write_text(json.dumps({"rows": [{"what": "map", "task": "maps", "length": 9}]}))
    _, text = compared(tmp_path / "out", runs)
    for line in (
        "| arm | tokens | chosen blocks hold | best | random | forced | read by 2 | read by 4 | read by 8 | next",
        "| `nsa` | 512 | 80.0% | 90.0% | 25.0% | 12.5% | 9.0 | 10.5 | 12.2 | 87.5% |",
        "| arm | tokens | layer | chosen blocks hold | best | random | forced | read by 2 | read by 4 | read by 8 |",
        "| `nsa` | 512 | 1 | 60.0% | 90.0% | 25.0% | 12.5% | 9.0 | 10.5 | 12.2 | 87.5% |",
        "![attention maps of full, seed 0](comparison_tiny_maps_full.png)",
        "![attention maps of nsa, seed 1](comparison_tiny_maps_nsa.png)",
    ):
        assert line in text
    assert (tmp_path / "out" / "comparison_tiny_maps_nsa.png").read_text() == runs[3].name
    assert "Long context" not in text


def test_selection_by_layer_of_runs_that_were_asked_at_longer_rows_only_is_that_of_the_shortest(tmp_path):
    runs = [make_run(tmp_path, arm) for arm in ("full", "nsa")]
    head = {
        "what": "head", "task": "blocks", "layer": 0, "kv_head": 0, "selection_recall": 0.5, "best_recall": 0.9,
        "random_recall": 0.25, "forced_recall": 0.125, "distinct_blocks": {"2": 9.0}, "neighbour_overlap": 0.875,
    }  # fmt: skip
    (runs[1] / "eval").mkdir()
    answers = runs[1] / "eval" / "blocks.json"
    answers.write_text(json.dumps({"rows": [head | {"length": 4096}, head | {"length": 1024}]}))
    _, text = compared(tmp_path / "out", runs)
    assert "| `nsa` | 1,024 | 0 | 50.0% |" in text
    assert "| `nsa` | 4,096 | 0 |" not in text


def test_answers_to_blocks_that_lack_figures_are_refused(tmp_path, capsys):
    runs = [make_run(tmp_path, arm) for arm in ("full", "nsa")]
    (runs[1] / "eval").mkdir()
    row = {"what": "head", "task": "blocks", "length": 512}
    (runs[1] / "eval" / "blocks.json").write_text(json.dumps({"rows": [row]}))
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out")]) == 2
    assert f"{runs[1]}: answers to task=blocks lack selection_recall, " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
