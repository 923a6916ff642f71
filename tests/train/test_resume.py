"""A run that was stopped, however and wherever, goes on with the losses of a run that was not."""

import json
import signal
from functools import partial

import pytest
from launch import MICRO_BATCHES, close_output, interrupt_twice, rows, signal_at, summary

pytestmark = pytest.mark.process
ENGINE, LOOP, CHECKPOINT = "nsa_train.parallel.engine:Engine", "nsa_train.train.loop", "nsa_train.train.checkpoint"


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (ENGINE, "backward", 2),  # inside the first step, before any checkpoint
        (ENGINE, "backward", 5 * MICRO_BATCHES),  # between the micro-batches of a step
        (LOOP, "lr_at", 7),  # right after a checkpoint
        (LOOP, "evaluate", 3),
    ],
)
def test_after_kill_9_the_losses_are_those_of_an_uninterrupted_run(owner, name, call, train, tmp_path, whole):
    assert train(before=partial(signal_at, owner, name, call, signal.SIGKILL)).wait() == -9
    again = train()
    assert again.wait() == 0, again.text
    assert rows(tmp_path / "run") == rows(whole)


@pytest.mark.parametrize(
    ("number", "owner", "name", "call", "step"),
    [
        (signal.SIGTERM, ENGINE, "backward", 5 * MICRO_BATCHES, 5),
        (signal.SIGINT, LOOP, "evaluate", 2, 5),  # the validation behind step 4
        (signal.SIGUSR1, CHECKPOINT, "save", 2, 7),  # the checkpoint of step 6
        (signal.SIGTERM, LOOP, "evaluate", 1, 1),  # before the first step
    ],
)
def test_a_signal_finishes_the_step_leaves_a_checkpoint_and_the_same_command_goes_on(
    number, owner, name, call, step, train, tmp_path, whole
):
    run = tmp_path / "run"
    stopped = train(before=partial(signal_at, owner, name, call, number))
    assert stopped.wait() == 75
    assert "the same command goes on" in stopped.text
    assert "Traceback" not in stopped.text
    assert (summary(run)["status"], summary(run)["exit_code"], summary(run)["steps"]) == ("interrupted", 75, step)
    assert (run / "checkpoints" / f"step_{step}" / "manifest.json").exists()
    again = train()
    assert again.wait() == 0, again.text
    assert f"resumed from {run / 'checkpoints' / f'step_{step}'}" in again.text
    assert rows(run) == rows(whole)


def test_dead_experts_between_log_steps_are_those_of_an_uninterrupted_run(train, tmp_path):
    few = ("trainer.log_every=4", "trainer.steps=8", "trainer.seq_len=16", "trainer.batch_rows=2", "moe.experts=96")
    assert train(*few, runs=tmp_path / "whole").wait() == 0
    assert train(*few, before=partial(signal_at, ENGINE, "backward", 6, signal.SIGKILL)).wait() == -9
    assert train(*few).wait() == 0  # from the checkpoint of step 3
    assert rows(tmp_path / "run") == rows(tmp_path / "whole" / "run")
    by_step = {row["step"]: row["dead_experts"] for row in rows(tmp_path / "run") if row["split"] == "train"}
    assert max(by_step[4] + by_step[8]) > 0


def test_a_model_without_experts_goes_on_too(train, tmp_path):
    dense = ("model.dense_layers=2", "trainer.steps=8")
    assert train(*dense, runs=tmp_path / "whole").wait() == 0
    assert train(*dense, before=partial(signal_at, ENGINE, "backward", 10, signal.SIGKILL)).wait() == -9
    again = train(*dense)
    assert again.wait() == 0, again.text
    assert "resumed from" in again.text
    assert rows(tmp_path / "run") == rows(tmp_path / "whole" / "run")


def test_a_signal_while_packages_are_imported_ends_with_75(train, tmp_path):
    stopped = train(before=partial(signal_at, "nsa_train.config.load", "load_config", 1, signal.SIGTERM))
    assert stopped.wait() == 75
    assert stopped.text == "stopped; the same command starts again\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_ends_with_75_at_once(number, train, tmp_path, whole):
    stopped = train(before=partial(signal_at, LOOP, "prepare", 1, number))
    assert stopped.wait() == 75
    assert "Traceback" not in stopped.text
    assert summary(tmp_path / "run") == {"steps": 0, "status": "interrupted", "exit_code": 75}
    assert train().wait() == 0
    assert rows(tmp_path / "run") == rows(whole)


def test_a_second_ctrl_c_ends_at_once_with_75_and_the_run_goes_on_from_the_last_checkpoint(train, tmp_path, whole):
    stopped = train(before=partial(interrupt_twice, ENGINE, "backward", 5 * MICRO_BATCHES))
    assert stopped.wait() == 75
    assert "Traceback" not in stopped.text
    found = summary(tmp_path / "run")
    assert (found["status"], found["exit_code"], found["steps"]) == ("interrupted", 75, 4)
    again = train()
    assert again.wait() == 0
    assert "at step 3\n" in again.text
    assert rows(tmp_path / "run") == rows(whole)


def test_a_console_that_nobody_reads_any_more_does_not_end_the_run(train, tmp_path, whole):
    assert train(before=close_output).wait() == 0
    assert summary(tmp_path / "run")["status"] == "done"
    assert rows(tmp_path / "run") == rows(whole)


def test_the_wandb_run_goes_on_after_the_folders_manifest_is_lost(train, killed):
    manifest = killed / "manifest.json"
    before = json.loads(manifest.read_text())["wandb_id"]
    manifest.unlink()
    assert train().wait() == 0
    assert json.loads(manifest.read_text())["wandb_id"] == before


def test_a_signal_in_the_last_step_lets_the_run_end(train, tmp_path):
    job = train("trainer.steps=2", before=partial(signal_at, ENGINE, "backward", 2 * MICRO_BATCHES, signal.SIGTERM))
    assert job.wait() == 0
    assert summary(tmp_path / "run")["status"] == "done"


def draw_nothing():
    from nsa_train.model.transformer import Transformer

    del Transformer.initial_values


def test_a_resumed_run_draws_no_initial_values_and_knows_their_hashes(train, killed, whole):
    job = train(before=draw_nothing)
    assert job.wait() == 0, job.text
    assert rows(killed) == rows(whole)
    hashes = [json.loads((run / "manifest.json").read_text())["initial_weights_sha256"] for run in (killed, whole)]
    assert hashes[0] == hashes[1]
    assert hashes[0]


def test_a_torn_last_line_of_the_metrics_is_dropped(train, killed, whole):
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "tokens": 30')
    assert train().wait() == 0
    assert rows(killed) == rows(whole)


def test_how_often_it_is_saved_and_logged_may_change_on_resume(train, killed, whole):
    assert train("trainer.checkpoint_every=5", "trainer.keep_checkpoints=9", "trainer.log_every=3").wait() == 0
    at = {row["step"]: row["loss"] for row in rows(whole) if row["split"] == "train"}
    train_rows = [row for row in rows(killed) if row["split"] == "train"]
    assert [row["step"] for row in train_rows] == [1, 2, 3, 4, 5, 6, 9, 12]
    assert [row["loss"] for row in train_rows] == [at[row["step"]] for row in train_rows]
    assert {path.name for path in (killed / "checkpoints").glob("step_*")} == {"step_3", "step_6", "step_10", "step_12"}


def test_validation_changes_no_training_loss(train, tmp_path, whole):
    assert train("trainer.val_every=100", "trainer.val_rows=1").wait() == 0
    assert [row for row in rows(tmp_path / "run") if row["split"] == "train"] == [
        row for row in rows(whole) if row["split"] == "train"
    ]


def test_killed_before_and_behind_a_change_of_stage_it_goes_on_with_the_same_losses(train, tmp_path):
    """Steps 1 to 5 have rows of 96 tokens and a mixture, the others half as many rows of 192 tokens and YaRN."""
    stages = [
        "stages.parts.short={tokens: 1920, seq_len: 96, mixture: {even: 0.7, odd: 0.3}, rope_factor: 1.0}",
        "stages.parts.long={tokens: null, seq_len: 192, mixture: {}, rope_factor: 2.0}",
    ]
    assert train(*stages, "name=undisturbed").wait() == 0
    in_fifth_step = partial(signal_at, ENGINE, "backward", 5 * MICRO_BATCHES - 1, signal.SIGKILL)
    assert train(*stages, before=in_fifth_step).wait() == -9  # of the run, with a checkpoint of step 3
    assert train(*stages, before=in_fifth_step).wait() == -9  # since then: step 8, with a checkpoint of step 6
    last = train(*stages)
    assert last.wait() == 0
    assert "from step 5: 2 rows of 192 tokens" in last.text
    found = rows(tmp_path / "run")
    assert found == rows(tmp_path / "undisturbed")
    assert {row["tokens"] / row["step"] for row in found if row["step"]} == {384}
