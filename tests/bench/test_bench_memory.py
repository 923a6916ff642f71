"""The memory benchmark: its cases, its rows, its table."""

import pytest

from nsa_train.bench import memory
from nsa_train.bench.runs import Run
from nsa_train.config.load import load_config
from nsa_train.plan.advice import GIB, need


def row_of(monkeypatch, tmp_path, run, case=memory.CASES[0], gpus=1):
    started = []
    monkeypatch.setattr(memory, "train_run", lambda folder, overrides, processes: started.append(overrides) or run)
    row = memory.one_run(case, gpus, ["data=stdlib"], tmp_path)
    return row, started[0]


@pytest.mark.parametrize("case", memory.CASES, ids=str)
def test_every_case_is_a_run_of_its_size_that_the_plan_knows(case, monkeypatch, tmp_path):
    row, overrides = row_of(monkeypatch, tmp_path, Run(1.0, None, [{"mem_gib": 1.0}, {"mem_gib": 3.0}], {}), case, 2)
    config = load_config(overrides)
    planned = need(config, 2)
    assert (config.trainer.micro_rows, config.trainer.batch_rows, config.trainer.seq_len) == (
        case[3],
        4 * case[3],
        case[2],
    )
    assert (row["peak_gib"], row["ratio"]) == (3.0, pytest.approx(3.0 * GIB / planned.total))
    parts = row["planned_gib"]
    total = sum(parts["states"].values()) + sum(parts["kept"].values()) + max(parts["passing"].values())
    assert total == pytest.approx(row["planned_total_gib"]) == pytest.approx(planned.total / GIB)


def test_the_cases_are_enough_and_differ():
    assert (
        len({memory.overrides_of(*case[:4], 1, case[4]).__str__() for case in memory.CASES}) == len(memory.CASES) >= 6
    )


def test_rows_of_two_runs_are_told_apart_and_a_run_that_is_repeated_is_not(monkeypatch, tmp_path):
    run = Run(1.0, None, [{"mem_gib": 12.34}], {})
    keys = [memory.key_of(row_of(monkeypatch, tmp_path, run, case)[0]) for case in (*memory.CASES, memory.CASES[0])]
    assert len(set(keys)) == len(memory.CASES)
    assert keys[-1] == keys[0]


def test_the_table_has_a_line_for_each_row_also_for_those_that_failed(monkeypatch, tmp_path):
    good, _ = row_of(monkeypatch, tmp_path, Run(1.0, None, [{"mem_gib": 12.34}], {}))
    bad, _ = row_of(monkeypatch, tmp_path, Run(1.0, "exit code 1: out of\nmemory", [], {}))
    assert "peak_gib" not in bad
    head, rule, *lines = memory.markdown([("GPU", good), ("GPU", bad)]).splitlines()
    assert len({line.count("|") for line in (head, rule, *lines)}) == 1
    assert f"{good['planned_total_gib']:.1f} | 12.3 | {good['ratio']:.2f} |" in lines[0]
    assert "failed" in lines[1]


def test_the_picture_has_every_run_s_peak_beside_the_plan(monkeypatch, tmp_path):
    done, _ = row_of(monkeypatch, tmp_path, Run(1.0, None, [{"mem_gib": 2.0}], {}))
    failed, _ = row_of(monkeypatch, tmp_path, Run(1.0, "exit code 1", [], {}), memory.CASES[1], gpus=2)
    drawn = []
    monkeypatch.setattr("nsa_train.bench.figures.save_figure", lambda figure, path: drawn.append((figure, path)))
    memory.plot_memory([done, failed], tmp_path / "memory.png", "a GPU")
    ((figure, path),) = drawn
    assert path == tmp_path / "memory.png"
    panels = {
        place.get_title(): {
            label.get_text(): text.get_text()
            for label, text in zip(place.get_yticklabels(), place.texts, strict=True)
        }
        for place in figure.axes
    }  # fmt: skip
    plans = [f"{row['planned_total_gib']:.4g}" for row in (done, failed)]
    assert panels == {
        "1 x a GPU, r1, nsa, 8 x 8k, bf16, ZeRO 2": {"planned": plans[0], "peak": "2"},
        "2 x a GPU, r1, full, 8 x 8k, bf16, ZeRO 2": {"planned": plans[1], "peak": "failed"},
    }


def test_no_path_of_the_machine_stands_in_a_row(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "train_run", lambda *arguments, **more: Run(1.0, "exit code 1", [], {}))
    row = memory.one_run(memory.CASES[0], 1, ["data=stdlib", f"data.corpus={tmp_path}/text"], tmp_path)
    assert row["overrides"][-1] == "data.corpus=text"
