"""A rank that hangs ends the job with 19 and everybody's stacks; one that fails ends it with its own words."""

import json
import os
import re
import signal
import subprocess
import time
from functools import partial

import pytest
from launch import MICRO_BATCHES, signal_at, summary

from nsa_train.train.failures import FIRST_FAILURE
from nsa_train.train.metrics import METRICS, read_metrics
from nsa_train.train.watchdog import FAILED_FIRST_S, Watchdog

pytestmark = pytest.mark.process
ENGINE = "nsa_train.parallel.engine:Engine"
HANG = "parallel.hang_s=4"
SOON_S = 60.0


def on_rank(rank, what, *arguments):
    """Only this rank is tampered with."""
    if int(os.environ.get("RANK", "0")) == rank:
        what(*arguments)


def do_at(step, what):
    """Call `what` in the forward pass of a training step, counted from 1."""
    from nsa_train import runtime
    from nsa_train.model.transformer import Transformer

    forward, calls = Transformer.forward, []

    def tampered(self, *args, **kwargs):
        if self.training:
            calls.append(None)
            if len(calls) == (step - 1) * MICRO_BATCHES // runtime.world_size() + 1:
                what()
        return forward(self, *args, **kwargs)

    Transformer.forward = tampered


def sleep_for_ever():
    time.sleep(10**6)


def search_with_pythons_lock():
    re.match("(a+)+$", "a" * 99 + "b")  # never ends, and no other thread of the process runs meanwhile


def stop_itself():
    os.kill(os.getpid(), signal.SIGSTOP)


def fail():
    raise RuntimeError("planted")


def hang_in_the_probe():
    from nsa_train.train import loop

    loop.probe_engine = lambda *arguments: sleep_for_ever()


def prepare_slowly():
    from nsa_train.train import loop

    prepare = loop.prepare
    loop.prepare = lambda *arguments: (time.sleep(8), prepare(*arguments))[1]


def wait_after_the_end_of(rank, run, agreed=False, seconds=10**6):
    found = {"rank": rank, "exit_code": 20, "message": "its disk is full", "agreed": agreed}
    (run / FIRST_FAILURE).write_text(json.dumps(found))
    time.sleep(seconds)


@pytest.mark.parametrize(("how", "code"), [(search_with_pythons_lock, -9), (stop_itself, 19)])
def test_a_hung_rank_is_found_stacks_are_written_and_the_job_ends_with_19(how, code, train_ranks, tmp_path):
    started = time.monotonic()
    jobs = train_ranks(2, HANG, before=partial(on_rank, 1, do_at, 5, how))
    assert [job.wait() for job in jobs] == [19, code]
    assert time.monotonic() - started < SOON_S
    run = tmp_path / "run"
    assert (summary(run)["status"], summary(run)["exit_code"]) == ("failed", 19)
    hung = (run / "stacks_rank_1.txt").read_text()
    assert how.__name__ in hung
    waiting = (run / "stacks_rank_0.txt").read_text()
    assert how.__name__ not in waiting
    assert "_train" in waiting
    assert f"checkpoint ended in 4 s (parallel.hang_s); stacks: {run / 'stacks_rank_1.txt'}" in jobs[1].text


def test_a_rank_that_hangs_before_the_first_step_is_found_too(train_ranks, tmp_path):
    started = time.monotonic()
    jobs = train_ranks(2, HANG, "parallel.timeout_s=40", before=partial(on_rank, 1, hang_in_the_probe))
    assert [job.wait() for job in jobs] == [19, 19]
    assert time.monotonic() - started < 40  # the collective of the rank that waits has not given up
    run = tmp_path / "run"
    assert (summary(run)["status"], summary(run)["steps"], summary(run)["exit_code"]) == ("failed", 0, 19)
    assert "sleep_for_ever" in (run / "stacks_rank_1.txt").read_text()
    assert "probe_engine" in (run / "stacks_rank_0.txt").read_text()
    assert "no part of the start ended in 10 s (parallel.timeout_s less 30, or parallel.hang_s)" in jobs[1].text


def test_the_preparation_of_the_corpus_may_take_longer_than_any_other_part_of_the_start(train):
    assert train("trainer.steps=1", HANG, "parallel.timeout_s=31", before=prepare_slowly).wait() == 0


def test_one_process_that_hangs_ends_with_19_too(train, tmp_path):
    assert (
        train(HANG, "trainer.log_every=2", "trainer.val_every=12", before=partial(do_at, 4, sleep_for_ever)).wait()
        == 19
    )
    run = tmp_path / "run"
    last = read_metrics(run / METRICS)[-1]
    assert last["step"] == 2
    told = summary(run)
    assert (told["exit_code"], told["steps"], told["tokens"]) == (19, 2, last["tokens"])


def test_a_hang_leaves_the_steps_that_an_earlier_launch_took_without_logging_them(train, tmp_path):
    quiet = ("trainer.log_every=12", "trainer.val_every=12")
    stop = partial(signal_at, ENGINE, "backward", 9, signal.SIGTERM)
    assert train(*quiet, before=stop).wait() == 75
    run = tmp_path / "run"
    taken = summary(run)["steps"]
    assert taken > 0
    (run / METRICS).write_text("")
    assert train(*quiet, HANG, before=partial(do_at, 1, sleep_for_ever)).wait() == 19
    assert (summary(run)["exit_code"], summary(run)["steps"]) == (19, taken)


def test_a_run_that_works_leaves_no_watchdog_and_no_stacks(train, tmp_path):
    job = train("trainer.steps=2")
    assert job.wait() == 0
    run = tmp_path / "run"
    assert not list(run.glob("stacks*"))
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in listed.splitlines() if "watchdog.py" in line and str(run) in line]


def test_a_process_that_a_rank_left_behind_does_not_keep_its_watchdog(tmp_path):
    watchdog = Watchdog(tmp_path, 60, 0, FIRST_FAILURE)
    heir = os.fork()
    if not heir:
        sleep_for_ever()
    started = time.monotonic()
    watchdog.stop()
    os.kill(heir, signal.SIGKILL)
    os.waitpid(heir, 0)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_ends_the_job_with_its_own_error(rank, train_ranks, tmp_path):
    started = time.monotonic()
    jobs = train_ranks(2, before=partial(on_rank, rank, do_at, 5, fail))
    assert [job.wait() for job in jobs] == [1, 1]
    assert time.monotonic() - started < SOON_S
    assert "RuntimeError: planted" in jobs[rank].text
    assert summary(tmp_path / "run")["exit_code"] == 1
    assert "Traceback" not in jobs[1 - rank].text
    if rank == 1:
        assert "error: rank 1 failed first: RuntimeError: planted\n" in jobs[0].text


def test_a_killed_rank_ends_the_job_soon(train_ranks):
    started = time.monotonic()
    kill = partial(signal_at, ENGINE, "backward", 5, signal.SIGKILL)
    jobs = train_ranks(2, before=partial(on_rank, 1, kill))
    assert [job.wait() for job in jobs] == [1, -9]
    assert time.monotonic() - started < SOON_S
    assert re.search("closed by peer|reset by peer", jobs[0].text)


def test_a_rank_that_waits_for_one_that_failed_is_ended_with_the_others_code(train, tmp_path):
    """As with NCCL, whose collectives do not notice that a rank has gone."""
    run = tmp_path / "run"
    job = train(before=partial(do_at, 5, partial(wait_after_the_end_of, 3, run)))
    assert job.wait() == 20
    assert "rank 3 failed first: its disk is full" in job.text
    assert summary(run)["exit_code"] == 20


def test_a_rank_that_hangs_behind_its_own_failure_is_found(train, tmp_path):
    job = train("parallel.hang_s=8", before=partial(do_at, 5, partial(wait_after_the_end_of, 0, tmp_path / "run")))
    assert job.wait() == 19


def test_a_rank_that_is_slow_to_end_where_all_agreed_to_is_waited_for(train, tmp_path):
    slow = partial(wait_after_the_end_of, 1, tmp_path / "run", agreed=True, seconds=FAILED_FIRST_S + 3)
    job = train(before=partial(do_at, 5, slow))
    assert job.wait() == 0, job.text
    assert summary(tmp_path / "run")["status"] == "done"
