"""A run folder belongs to one job and one configuration, and what stands in it is not written over."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from launch import contents, has_step, rows, signal, signal_at, summary, wait_until

from nsa_train.config.load import load_config
from nsa_train.train.folder import RunFolder

pytestmark = pytest.mark.process


def root_of(corpus):
    return Path(next(word for word in corpus if word.startswith("data.root=")).removeprefix("data.root="))


def test_a_second_job_on_a_folder_is_refused_and_the_first_is_not_disturbed(train, tmp_path, whole):
    run = tmp_path / "run"
    first = train(before=partial(signal_at, "nsa_train.train.loop", "evaluate", 2, signal.SIGSTOP))
    wait_until(lambda: has_step(run, 4), first)
    before = contents(run)
    second = train()
    assert second.wait() == 2
    assert f"{run} is in use by another job (process {first.process.pid} on " in second.text
    assert "Traceback" not in second.text
    assert contents(run) == before
    first.send(signal.SIGCONT)
    assert first.wait() == 0
    assert rows(run) == rows(whole)


def test_another_configuration_under_the_same_name_is_refused(train, killed):
    before = contents(killed)
    job = train("optim.lr=0.1", "seed=1")
    assert job.wait() == 2
    assert "holds a run with another configuration" in job.text
    assert "optim.lr: 0.003 there, 0.1 now" in job.text
    assert "seed: 0 there, 1 now" in job.text
    assert contents(killed) == before


def test_a_run_of_before_a_key_came_goes_on_with_the_value_of_its_recipe(train, killed, whole):
    path = killed / "config.yaml"
    words = path.read_text()
    assert "  force_balance: false\n" in words
    path.write_text(words.replace("  force_balance: false\n", ""))
    assert train("trainer.force_balance=true").wait() == 2
    again = train()
    assert again.wait() == 0, again.text
    assert rows(killed) == rows(whole)


def test_a_finished_run_says_so_and_changes_nothing(train, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    before = contents(tmp_path / "run")
    job = train()
    assert job.wait() == 0
    assert f"{tmp_path / 'run'} is finished: 12 steps, held-out loss {summary(whole)['val_loss_first']:.4f}" in job.text
    assert contents(tmp_path / "run") == before


def test_a_checkpoint_of_another_model_is_refused_with_17(train, whole, tmp_path):
    shutil.copytree(whole / "checkpoints", tmp_path / "run" / "checkpoints")
    before = contents(tmp_path / "run" / "checkpoints")
    job = train("model.layers=3")
    assert job.wait() == 17
    assert f"{tmp_path / 'run' / 'checkpoints' / 'step_12'} belongs to another model" in job.text
    assert "Traceback" not in job.text
    assert contents(tmp_path / "run" / "checkpoints") == before
    assert summary(tmp_path / "run")["exit_code"] == 17


def test_text_that_changed_since_the_checkpoint_is_refused(train, killed, corpus, tmp_path):
    text = (root_of(corpus) / "corpus.jsonl").read_text()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "corpus.jsonl").write_text(text.replace("import", "deport", 1))
    metrics = (killed / "metrics.jsonl").read_bytes()
    job = train(f"data.root={tmp_path / 'other'}", f"data.prepared_dir={tmp_path / 'prepared'}")
    assert job.wait() == 2
    assert "the checkpoint at step 6 read other rows" in job.text
    assert (killed / "metrics.jsonl").read_bytes() == metrics


def test_a_failed_start_keeps_what_the_summary_says_of_the_run(train, killed, tmp_path):
    stopped = {"status": "interrupted", "steps": 6, "val_loss_last": 5.5, "exit_code": 75}
    (killed / "summary.json").write_text(json.dumps(stopped))
    (tmp_path / "empty").mkdir()
    assert train(f"data.root={tmp_path / 'empty'}").wait() == 2
    assert summary(killed) == {**stopped, "status": "failed", "exit_code": 2}


@pytest.mark.parametrize("content", ["[1]", "3", '"done"', "\x00", '{"status": "done"'])
def test_a_damaged_summary_or_manifest_does_not_stop_a_run(content, killed):
    folder = RunFolder(load_config([f"runs_dir={killed.parent}", "name=run"]))
    (killed / "summary.json").write_text(content)
    assert folder.read_json("summary.json") == {}


def test_a_run_that_never_started_does_not_bind_its_name(train, tmp_path, whole):
    assert train("data.paths=[corpus.json]").wait() == 2
    assert summary(tmp_path / "run") == {"steps": 0, "status": "failed", "exit_code": 2}
    assert train().wait() == 0
    assert rows(tmp_path / "run") == rows(whole)


def test_a_folder_that_cannot_be_made_is_named(train, tmp_path):
    (tmp_path / "file").write_text("")
    job = train(runs=tmp_path / "file")
    assert job.wait() == 20
    assert f"{tmp_path / 'file' / 'run'}: cannot write the run folder" in job.text
