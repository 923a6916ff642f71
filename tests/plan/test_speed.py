"""Planned speed: shares reproduce what they were measured from, and more work or fewer GPUs take longer."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import load_script

from nsa_train.bench.results import RESULTS
from nsa_train.config.load import load_config
from nsa_train.data.stages import at_stage, stages_of
from nsa_train.errors import ConfigError
from nsa_train.plan import speed
from nsa_train.plan.report import Machine, plan

ROOT = Path(__file__).resolve().parents[2]
MS = {  # of a step of `m` on one GPU, as a profile gives them
    "experts": 335.0, "attention": 270.0, "other": 200.0, "attention, slc": 208.0, "attention, win": 114.0,
    "attention, cmp": 80.0, "head": 71.0, "optimizer": 56.0, "router": 41.0, "norms": 25.0, "attention, gates": 18.0,
    "attention, selection": 16.0, "dense MLP": 15.0, "embedding": 29.0,
}  # fmt: skip


def alone(*options, ranks=1):
    config = load_config(options)
    return at_stage(config, stages_of(config)[0], ranks)


def tokens_per_s(*options, ranks=1, kind="h100"):
    config = alone(*options, ranks=ranks)
    seconds = sum(speed.step_seconds(config, kind, ranks).values())
    return config.trainer.batch_rows * config.trainer.seq_len / seconds


def test_a_measured_step_fitted_and_predicted_is_that_step_again():
    config = alone("experiment=m", "trainer.batch_rows=8")
    shares = speed.fitted(config, speed.GPUS["h200"], 1, MS)
    found = {part: 1e3 * seconds for part, seconds in speed.step_seconds(config, "h200", 1, shares).items()}
    wanted = {part: ms for part, ms in MS.items() if part != "embedding"} | {"other": 229.0}
    assert found == pytest.approx(wanted)


def test_the_script_prints_the_shares_of_a_result_file(tmp_path):
    row = {"preset": "m", "attention": "nsa", "T": 8192, "gpus": 1, "micro_batch": 2, "batch_rows": 8,
           "checkpointing": False, "overrides": ["trainer.batch_rows=8"], "parts": MS}  # fmt: skip
    host = {"data": 3.0, "waiting for the host": 500.0}
    rows = [row | {"parts": MS | host}, row | {"attention": "full", "parts": {"experts": 1.0}}, row | {"parts": {}}]
    idle = {part: 3 * ms for part, ms in MS.items()}
    rows.append(row | {"micro_batch": 1, "parts": idle})  # fewer rows a pass: says less of what the GPU can do
    head = {"schema": "nsa-train/training/1", "date": "2026-01-01", "commit": None, "command": "c"}
    path = tmp_path / "training_h200.json"
    path.write_text(json.dumps({**head, "device": {"name": speed.GPUS["h200"].name}, "rows": rows}))
    script = [sys.executable, ROOT / "scripts" / "fit_speed.py", path]
    text = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    found = ast.literal_eval("{" + "".join(text.splitlines()[1:]) + "}")
    wanted = speed.fitted(alone("experiment=m", "trainer.batch_rows=8"), speed.GPUS["h200"], 1, MS)
    assert found == {part: {size: round(share, 3) for size, share in shares.items()} for part, shares in wanted.items()}


def test_shares_in_the_table_are_shares_of_measured_sizes_between_which_they_lie():
    for shares in speed.SHARES.values():
        assert all(0 < share <= 1 for measured in shares.values() for share in measured.values())
    measured = {64: 0.2, 256: 0.4}
    assert [speed.share_at(size, measured) for size in (16, 64, 128, 256, 999)] == pytest.approx(
        [0.2, 0.2, 0.3, 0.4, 0.4]
    )


@pytest.mark.parametrize(("kind", "table"), [("h100", speed.H100), ("h200", speed.H200)])
def test_shares_are_what_the_results_say(kind, table, monkeypatch):
    fit, found = load_script("fit_speed", monkeypatch), {}
    for path in (f"training_{kind}.json", "attention_h100.json"):
        result = json.loads((RESULTS / path).read_text())
        if speed.kind_of(result["device"]["name"]) == kind:
            found |= fit.OF[path.split("_")[0]](speed.GPUS[kind], result["rows"])
    if kind == "h200":
        del found["other"]  # of rows from before one rank added gradients at once
    assert table == {part: {size: round(share, 3) for size, share in found[part].items()} for part in found}


@pytest.mark.parametrize("kind", speed.GPUS)
@pytest.mark.parametrize("arm", ["nsa", "full", "window", "nsa_no_slc", "nsa_no_win", "nsa_random", "full_gated"])
def test_every_part_of_every_arm_takes_time_and_has_a_share(arm, kind):
    for preset in ("tiny", "r1", "paper_27b"):
        config = alone(
            f"experiment={preset}", f"attention={arm}", "trainer.dtype=bf16", "trainer.seq_len=4096",
            "trainer.batch_rows=32", ranks=8,
        )  # fmt: skip
        seconds = speed.step_seconds(config, kind, 8)
        assert set(seconds) <= set(speed.SHARES[kind])
        scored = arm not in ("nsa_random", "nsa_no_slc")  # selection takes time only where blocks are scored
        assert [p for p, s in seconds.items() if s <= 0 and (scored or p != "attention, selection")] == []


def test_a_model_without_experts_has_a_speed():
    config = load_config(["model.dense_layers=4", "trainer.dtype=bf16"])
    assert config.model.dense_layers == config.model.layers
    assert "tokens/s" in plan(config)
    assert "experts" not in speed.step_flops(config, 1)


def test_more_and_larger_gpus_are_faster_but_not_by_more_than_their_number():
    by_ranks = [tokens_per_s("experiment=m", ranks=ranks) for ranks in (1, 2, 8, 16)]
    assert by_ranks == sorted(by_ranks)
    assert by_ranks[2] < 8 * by_ranks[0]
    assert tokens_per_s("experiment=m", kind="h200") > tokens_per_s("experiment=m", kind="h100")


def test_longer_rows_are_slower_most_of_all_for_full_attention():
    def slower(arm):
        rows = [f"attention={arm}", "experiment=m"]
        short = tokens_per_s(*rows, "trainer.seq_len=8192", "trainer.batch_rows=32")
        long = tokens_per_s(*rows, "trainer.seq_len=32768", "trainer.batch_rows=8")
        return short / long

    assert slower("full") > 1.3 * slower("nsa") > 1.3


@pytest.mark.parametrize("parts", ["[attention]", "[mlp]", "[attention,mlp]"])
def test_recomputation_takes_a_forward_pass_more_of_what_is_recomputed(parts):
    once, again = (
        speed.step_seconds(
            alone("experiment=r1", f"trainer.activation_checkpointing={on}", f"trainer.recomputed={parts}"), "h100", 1
        )
        for on in (False, True)
    )
    ratio = {part: again[part] / seconds for part, seconds in once.items()}
    assert {ratio.pop(part) for part in ("head", "router", "optimizer", "other")} == {1.0}
    mlp = {part: ratio.pop(part) for part in ("experts", "dense MLP")}
    assert mlp == pytest.approx(dict.fromkeys(mlp, 4 / 3 if "mlp" in parts else 1))
    if "attention" not in parts:
        assert set(ratio.values()) == {1.0}
        return
    assert ratio.pop("attention, selection") == pytest.approx(2)
    assert 1 < ratio.pop("norms") < 4 / 3 < ratio.pop("attention, gates")
    assert ratio == pytest.approx(dict.fromkeys(ratio, 4 / 3))


def test_smaller_micro_batches_take_longer():
    assert tokens_per_s("experiment=r1", "trainer.micro_rows=1") < tokens_per_s("experiment=r1")


def test_zero_3_sends_more_and_zero_1_less_than_zero_2():
    sent = [
        speed.sent_bytes(alone("trainer.dtype=fp32", "trainer.micro_rows=1", f"parallel=zero{stage}", ranks=2), 2)
        for stage in (1, 2, 3)
    ]
    assert sent == sorted(set(sent))


def test_a_run_of_stages_takes_what_its_stages_take_together():
    rows = ["trainer.batch_rows=32", "trainer.micro_rows=16"]
    config = load_config(["stages=long_64k", "experiment=r1", *rows, "trainer.steps=9000"])
    short, long = stages_of(config)
    assert (at_stage(config, long, 1).trainer.seq_len, at_stage(config, long, 1).trainer.micro_rows) == (65536, 2)
    seconds = [sum(speed.step_seconds(at_stage(config, stage, 1), "h100", 1).values()) for stage in (short, long)]
    steps = [long.first_step, 9000 - long.first_step]
    assert min(steps) > 0
    assert speed.run_seconds(config, "h100", 1) == pytest.approx(
        sum(s * n for s, n in zip(seconds, steps, strict=True))
    )


def test_only_whole_names_of_known_gpus_have_a_kind():
    assert speed.kind_of("NVIDIA H100 80GB HBM3") == "h100"
    assert [speed.kind_of(name) for name in ("NVIDIA H100 PCIe", "CPU", "NVIDIA H200 NVL")] == [None] * 3


def test_the_report_has_a_column_for_each_number_of_gpus():
    machine, rest = Machine.parse(["experiment=r1", "gpu=h200", "gpus=2,4"])
    assert (machine, rest) == (Machine("h200", (2, 4)), ["experiment=r1"])
    text = plan(load_config(rest), machine)
    assert text.count("GPUs                                       2             4") == 2
    assert "on h200" in text
    assert "fits 2 x h200" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpu=a100"], "gpu=a100: no such kind of GPU; use h100 or h200"),
        (["gpus=0"], "gpus=0: gpus must be numbers from 1 on"),
        (["gpus=8,x"], "gpus=8,x: gpus must be"),
    ],
)
def test_a_machine_that_is_not_known_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        Machine.parse(words)


def test_gpus_that_cannot_share_a_step_are_refused():
    with pytest.raises(ConfigError, match=r"gpus=3: trainer\.batch_rows=32 is not a multiple of the 3 processes"):
        plan(load_config(["experiment=r1", "trainer.batch_rows=32"]), Machine(gpus=(3,)))


def test_no_speed_is_said_where_none_was_measured():
    config = load_config(["experiment=r1", "trainer.dtype=fp32"])
    assert "no speed" in plan(config)
    assert "tokens/s" not in plan(config)


def test_sums_of_gradients_move_less_on_one_rank():
    """An element of 2 bytes: read, and its fp32 sum read and written; through buckets 24 and, kept by a rank, 18."""

    def bytes_of_an_element(ranks, *words):
        config = alone("experiment=m", "trainer.batch_rows=24", *words, ranks=ranks)
        found, micro_batches = speed.step_bytes(config, ranks)["other"], 24 / ranks / config.trainer.micro_rows
        return found / micro_batches / speed._parameters(config)

    assert bytes_of_an_element(1) == pytest.approx(10)
    assert bytes_of_an_element(1, "parallel.offload_optimizer=cpu") == pytest.approx(42)
    assert bytes_of_an_element(2) == pytest.approx(33)
