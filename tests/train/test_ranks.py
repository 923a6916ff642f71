"""The number of processes and how they share the work change rounding only; what one of them sees, all act on."""

import itertools
import os
import time
from functools import partial

import pytest
import torch
from launch import MICRO_BATCHES, STEPS, limit_file_size, losses, rows, signal, signal_at, spoil_losses, summary
from safetensors.torch import load_file

from nsa_train.train.checkpoint import verify

pytestmark = pytest.mark.process
TOLERANCE = 1e-5  # relative, of fp32 sums in another order over twelve steps; a step changes the loss by 1e-2


def wait_all(jobs, code=0):
    assert [job.wait() for job in jobs] == [code] * len(jobs), "\n".join(job.text for job in jobs)


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, "zero2"), (2, "zero3")), ((2, "zero3"), (1, "zero1")), ((2, "zero1"), (4, "zero2"))],
    ids=str,
)
def test_a_run_goes_on_with_other_processes_and_another_zero_stage(before, after, train_ranks, tmp_path, whole):
    run = tmp_path / "run"
    jobs = train_ranks(before[0], f"parallel={before[1]}", extra={"NSA_TRAIN_KILL_AT": "checkpoint-retention"})
    assert jobs[0].wait() == -9
    for job in jobs[1:]:
        job.process.kill()
        job.process.join()
    jobs = train_ranks(after[0], f"parallel={after[1]}")
    wait_all(jobs)
    assert "at step 9\n" in jobs[0].text
    assert losses(run) == pytest.approx(losses(whole), rel=TOLERANCE)
    torch.testing.assert_close(biases(run), biases(whole), rtol=0, atol=1e-7)
    assert all(bias.abs().max() > 0 for bias in biases(whole).values())


def biases(run):
    """Of the routers, behind the last step."""
    return load_file(run / "checkpoints" / f"step_{STEPS}" / "buffers.safetensors")


def test_a_disk_that_is_full_for_one_process_ends_all_of_them_with_20(train_ranks, tmp_path):
    jobs = train_ranks(2, before=partial(limit_file_size, 100_000, ranks=[1]))
    wait_all(jobs, 20)
    assert "cannot write a checkpoint" in jobs[0].text
    assert "Traceback" not in "".join(job.text for job in jobs)
    assert (summary(tmp_path / "run")["exit_code"], summary(tmp_path / "run")["steps"]) == (20, 3)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_rows_that_the_processes_cannot_share_are_refused_with_all_that_is_wrong(train_ranks, tmp_path):
    jobs = train_ranks(3, "parallel.offload_params=cpu", "trainer.step=5")
    wait_all(jobs, 2)
    assert "3 problems in the configuration" in jobs[0].text
    assert "trainer.batch_rows=4 is not a multiple of the 3 processes" in jobs[0].text
    assert "".join(job.text for job in jobs[1:]) == ""
    assert not (tmp_path / "run").exists()


def jumping_clock():
    """Rank 1 starts two seconds late, and its clock jumps by an hour, to and fro."""
    if os.environ["RANK"] == "1":
        time.sleep(2)
        now, calls = time.time, itertools.count()
        time.time = lambda: now() + 3600 * (next(calls) % 2)


def test_clocks_that_jump_and_a_late_rank_make_one_folder_and_sane_times(train_ranks, tmp_path, whole):
    started = time.monotonic()
    wait_all(train_ranks(2, before=jumping_clock))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["run"]
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=TOLERANCE)
    assert 0 < summary(tmp_path / "run")["wall_s"] < time.monotonic() - started


# Steps that are not finite --------------------------------------------------------------------------------------------


def digests(checkpoint):
    return {name: known["sha256"] for name, known in verify(checkpoint)["files"].items()}


def test_a_step_that_is_not_finite_on_one_process_is_skipped_by_all_and_counted(train_ranks, tmp_path, whole):
    run = tmp_path / "run"
    jobs = train_ranks(
        2,
        "trainer.checkpoint_every=1",
        "trainer.keep_checkpoints=99",
        before=partial(spoil_losses, ranks=[1], steps=[5]),
    )
    wait_all(jobs)
    steps = {row["step"]: row for row in rows(run) if row["split"] == "train"}
    assert [step for step, row in steps.items() if row["skipped"]] == [5]
    assert (steps[5]["loss"], steps[5]["grad_norm"]) == (None, None)
    assert summary(run)["skipped_steps"] == 1
    checkpoints = run / "checkpoints"
    assert digests(checkpoints / "step_5") == digests(checkpoints / "step_4")  # weights, moments, router, random states
    assert digests(checkpoints / "step_6") != digests(checkpoints / "step_5")
    assert verify(checkpoints / "step_12")["steps_taken"] == STEPS - 1
    before = {at: loss for at, loss in losses(whole).items() if at[1] < 5}
    assert {at: losses(run)[at] for at in before} == pytest.approx(before, rel=TOLERANCE)
    assert steps[6]["loss"] == pytest.approx(
        next(v for k, v in losses(whole).items() if k[:2] == ("train", 6)), rel=0.1
    )


# Steps whose loss jumps -----------------------------------------------------------------------------------------------

JUMP = ["trainer.spike_window=4", "trainer.spike_sigmas=9"]


def jump(steps):
    return partial(spoil_losses, ranks=[1], steps=steps, factor=3.0)


def test_a_step_whose_loss_jumps_is_skipped_by_all_and_does_not_enter_the_window(train_ranks, tmp_path):
    """Two in a row are both found: the first has not moved what the second is measured by. Also across a resume."""
    run = tmp_path / "run"
    words = [*JUMP, "trainer.checkpoint_every=1", "trainer.keep_checkpoints=99"]
    interrupted = train_ranks(2, *words, before=partial(jump_and_stop, steps=[7, 8], stop=7))
    wait_all(interrupted, 75)
    wait_all(train_ranks(2, *words, before=jump([1])))  # the first that it takes is step 8
    steps = {row["step"]: row for row in rows(run) if row["split"] == "train"}
    assert [step for step, row in steps.items() if row["spike"]] == [7, 8]
    assert [step for step, row in steps.items() if row["skipped"]] == [7, 8]
    assert steps[7]["loss"] > 1.5 * steps[6]["loss"]
    checkpoints = run / "checkpoints"
    assert digests(checkpoints / "step_8") == digests(checkpoints / "step_6")
    assert summary(run)["skipped_steps"] == 2
    assert verify(checkpoints / "step_12")["steps_taken"] == STEPS - 2


def jump_and_stop(steps, stop):
    jump(steps)()
    signal_at("nsa_train.parallel.engine:Engine", "backward", stop, signal.SIGTERM)  # one micro-batch a step and rank


def test_a_jump_may_only_be_warned_of(train_ranks, tmp_path):
    wait_all(train_ranks(2, *JUMP, "trainer.on_spike=warn", before=jump([7])))
    steps = {row["step"]: row for row in rows(tmp_path / "run") if row["split"] == "train"}
    assert (steps[7]["spike"], steps[7]["skipped"]) == (True, False)
    assert summary(tmp_path / "run")["skipped_steps"] == 0


def test_a_jump_may_stop_the_run_with_18(train_ranks, tmp_path):
    jobs = train_ranks(2, *JUMP, "trainer.on_spike=stop", before=jump([7]))
    wait_all(jobs, 18)
    assert "the loss of step 7 jumped to" in jobs[0].text
    assert "Traceback" not in "".join(job.text for job in jobs)
    assert verify(tmp_path / "run" / "checkpoints" / "step_6")["steps_taken"] == 6


def test_steps_that_stay_not_finite_stop_every_process_with_18(train_ranks, tmp_path):
    run = tmp_path / "run"
    jobs = train_ranks(2, "trainer.max_bad_steps=3", before=partial(spoil_losses, ranks=[0], steps=range(5, 99)))
    wait_all(jobs, 18)
    assert "not finite, or jumped, in 3 steps in a row, up to step 7" in jobs[0].text
    assert "Traceback" not in "".join(job.text for job in jobs)
    assert (summary(run)["status"], summary(run)["exit_code"], summary(run)["skipped_steps"]) == ("failed", 18, 3)
    assert [row["step"] for row in rows(run) if row.get("skipped")] == [5, 6, 7]


def test_skipped_steps_in_a_row_are_counted_across_a_resume(train, tmp_path):
    assert train("trainer.max_bad_steps=5", before=spoil_and_stop).wait() == 75  # after step 3, all of them skipped
    resumed = train("trainer.max_bad_steps=5", before=partial(spoil_losses, ranks=[0], steps=range(1, 99)))
    assert resumed.wait() == 18
    assert "not finite, or jumped, in 5 steps in a row, up to step 5" in resumed.text
    assert [row["step"] for row in rows(tmp_path / "run") if row.get("skipped")] == [1, 2, 3, 4, 5]


def spoil_and_stop():
    spoil_losses([0], range(1, 99))
    signal_at("nsa_train.parallel.engine:Engine", "backward", 3 * MICRO_BATCHES, signal.SIGTERM)


def test_a_learning_rate_that_explodes_ends_with_18_and_keeps_the_last_checkpoint(train, tmp_path):
    job = train("optim.lr=1e30", "optim.clip=0")
    assert job.wait() == 18
    assert "lower optim.lr" in job.text
    assert "Traceback" not in job.text
    assert verify(tmp_path / "run" / "checkpoints" / "step_3")["step"] == 3
