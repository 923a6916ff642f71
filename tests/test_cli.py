"""What a person asks for on the command line: quick help, the configuration, its cost, what a machine lacks."""

import os
import re
import resource
import subprocess
import sys

import pytest
import torch

from nsa_train import doctor, runtime
from nsa_train.cli import COMMANDS, main
from nsa_train.config.load import load_config
from nsa_train.model.counts import count_parameters, meta_model
from nsa_train.ops import reference
from nsa_train.ops.fixed_blocks import fixed_blocks
from nsa_train.plan import flops
from nsa_train.plan.memory import states


def cpu_seconds(*command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_names_every_command_in_under_half_a_second():
    """Of CPU time, so that a busy machine is no failure; the quickest of three, for the same reason."""
    assert min(cpu_seconds(sys.executable, "-m", "nsa_train", "--help") for _ in range(3)) < 0.5
    text = subprocess.run([sys.executable, "-m", "nsa_train", "--help"], capture_output=True, text=True, check=True)
    assert [name for name in COMMANDS if not re.search(rf"^ +{name}\b", text.stdout, re.MULTILINE)] == []
    assert "75 interrupted" in text.stdout


@pytest.mark.parametrize("command", [["bench"], ["compare"], ["compare", "keep"], ["eval"], ["train"]], ids=" ".join)
def test_every_command_can_be_asked_for_help(command):
    words = [sys.executable, "-m", "nsa_train", *command, "--help"]
    assert "usage: nsa-train" in subprocess.run(words, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "abc"}, "RANK=abc in the environment must be a number from 0 on"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment must be a number from 1 on"),
        ({"RANK": "0"}, "RANK in the environment without LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
    ],
)
def test_a_launcher_that_tells_half_is_refused(environment, said, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "nsa_train", "train", f"runs_dir={tmp_path}"], env=os.environ | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "nsa_train", "config"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["config", "train"])
def test_stage_1_without_a_dtype_is_refused_on_a_machine_with_a_gpu_before_anything_starts(
    command, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(runtime, "device", lambda: torch.device("cuda", 0))
    assert main([command, "parallel=zero1", f"runs_dir={tmp_path}", "trainer.step=5"]) == 2
    told = capsys.readouterr().err
    assert "2 problems in the configuration" in told
    assert "trainer.dtype=auto is bf16 on a GPU" in told
    assert list(tmp_path.iterdir()) == []


def test_the_plan_of_stage_1_is_of_a_gpu_too(capsys):
    assert main(["plan", "parallel=zero1"]) == 2
    assert "trainer.dtype=auto is bf16 on a GPU" in capsys.readouterr().err


# plan -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["nsa", "full", "window", "nsa_no_win"])
def test_the_plan_counts_the_keys_that_the_reference_shows_a_query(arm):
    sizes = [f"attention.{key}" for key in ("cmp_block=8", "cmp_stride=4", "slc_block=8", "slc_count=5", "window=17")]
    config = load_config([f"attention={arm}", "trainer.seq_len=133", *sizes])
    a, L = config.attention, config.trainer.seq_len
    spec = reference.NSASpec(a.cmp_block, a.cmp_stride, a.slc_block, a.slc_count, a.slc_init, a.slc_local, a.window)
    blocks = fixed_blocks(torch.arange(L), 1, spec, torch.tensor(0))
    seen = {
        "full": torch.ones(L, L).tril(), "cmp": reference.cmp_visible(L, spec),
        "slc": reference.slc_visible(blocks, L, spec)[:, 0], "win": reference.win_visible(L, spec.window),
    }  # fmt: skip
    found = flops.keys_read(config)
    assert set(found) == set(a.branches)
    for branch, keys in found.items():
        assert keys == pytest.approx(float(seen[branch].sum()) / L), branch


def test_blocks_cost_nothing_to_score_where_none_is_read_by_its_score():
    cost = {arm: flops.importance_flops(load_config([f"attention={arm}"])) for arm in ("nsa", "nsa_no_win")}
    assert cost["nsa"] == cost["nsa_no_win"] > 0
    assert [flops.importance_flops(load_config([f"attention={a}"])) for a in ("full", "nsa_random", "nsa_no_slc")] == [
        0,
        0,
        0,
    ]


@pytest.mark.parametrize("options", [[], ["attention=full"], ["experiment=r1", "attention.phi=gated_pool"]], ids=str)
def test_the_plans_parts_add_up(options, capsys):
    config = load_config(options)
    assert main(["plan", *options]) == 0
    text = capsys.readouterr().out
    parameters, flops, *_ = text.split("\n\n")[1:]
    rows = [line.replace(",", "").split()[-2:] for line in parameters.splitlines()[1:-1]]
    counted = count_parameters(meta_model(config))
    assert [sum(int(row[i]) for row in rows) for i in (0, 1)] == [counted["total"], counted["active"]]
    assert f"{counted['total']:,}" in parameters.splitlines()[-1]
    shares = [float(line.split()[-1].rstrip("%")) for line in flops.splitlines() if line.endswith("%")]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert [branch for branch in config.attention.branches if f"attention, {branch}" not in flops] == []
    assert "GiB per rank" in text


def test_more_ranks_share_optimizer_state_and_stage_2_gradients_too():
    parts = ("weights", "gradients", "optimizer")

    def per_parameter(ranks, *options):
        config = load_config(options)
        found = states(config, ranks)
        return [found[part] / count_parameters(meta_model(config))["total"] for part in parts]

    assert per_parameter(1, "trainer.dtype=bf16", "parallel=zero2") == [2, 4, 12]
    assert per_parameter(8, "trainer.dtype=bf16", "parallel=zero2") == [2, 4 / 8, 12 / 8]
    assert per_parameter(8, "trainer.dtype=fp32", "parallel=zero1") == [4, 4, 12 / 8]
    assert per_parameter(8, "trainer.dtype=bf16", "parallel=zero3") == [2 / 8, 4 / 8, 12 / 8]
    assert per_parameter(8, "parallel.offload_optimizer=cpu")[2] == 0


# doctor ---------------------------------------------------------------------------------------------------------------


def verdicts(caplog, *overrides):
    caplog.clear()
    code = doctor.examine(load_config(overrides))
    return code, [(record.args[0], record.args[1]) for record in caplog.records]


@pytest.fixture(autouse=True)
def hear(caplog):
    caplog.set_level("INFO", logger="nsa_train")


def test_doctor_says_one_line_for_each_thing_and_all_is_there(caplog, tmp_path):
    code, lines = verdicts(caplog, f"runs_dir={tmp_path / 'not' / 'yet'}")
    assert code == 0
    assert {verdict for verdict, _ in lines} <= {"ok", "warn"}
    for words in (f"torch {torch.__version__}", "deepspeed ", "CPU cores", f"GiB free at {tmp_path}", "W&B offline"):
        assert [line for _, line in lines if words in line], words
    assert torch.cuda.is_available() or [line for verdict, line in lines if verdict == "warn" and "no CUDA" in line]


def test_doctor_fails_where_training_would(caplog, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    code, lines = verdicts(caplog, f"runs_dir={tmp_path / 'file' / 'runs'}")
    assert (code, [line for verdict, line in lines if verdict == "FAIL"]) == (
        2, [f"runs_dir: {tmp_path / 'file'} is not a folder that can be written to"],
    )  # fmt: skip
    monkeypatch.setattr(runtime, "versions", lambda: {"deepspeed": "missing", "wandb": "missing"})
    code, lines = verdicts(caplog)
    assert code == 2
    assert lines[:2] == [("FAIL", "deepspeed missing"), ("warn", "wandb missing")]
