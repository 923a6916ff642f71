"""The same runs as a user starts them, by the launchers in scripts/, in processes of their own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import PATIENCE_S, SMALL, free_port, has_step, losses, rows, summary, wait_until

pytestmark = pytest.mark.process
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SOON_S = 60.0
ALONE = [sys.executable, "-m", "nsa_train"]


@pytest.fixture(autouse=True)
def this_python(monkeypatch):
    """Not that of the checkout's .venv, which need not be there."""
    monkeypatch.setenv("PYTHON", sys.executable)


def start(command, tmp_path):
    """A process at the head of its own group, as a terminal would start it; its output goes to a file.

    What a shell runs in the background ignores Ctrl-C, and hands that down, also from tests.
    """
    with (tmp_path / "output").open("a") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip


@pytest.fixture
def words(corpus, tmp_path):
    return [*SMALL, *corpus, f"runs_dir={tmp_path}", "name=run"]


def launcher(name, *options):
    return [str(SCRIPTS / f"train_{name}.sh"), *map(str, options)]


def logged(run):
    return "".join(path.read_text() for path in (run / "logs").glob("*.log"))


def test_ctrl_c_under_torchrun_with_two_processes_and_on_under_deepspeed(words, tmp_path, whole):
    run, output = tmp_path / "run", tmp_path / "output"
    torchrun = start([*launcher("torchrun", "--processes", 2, "--restarts", 1), *words], tmp_path)
    try:
        wait_until(lambda: has_step(run, 1) or torchrun.poll() is not None)
        os.killpg(torchrun.pid, signal.SIGINT)
        assert torchrun.wait(PATIENCE_S) == 75, output.read_text()
    finally:
        torchrun.kill()
    stopped = summary(run)
    assert (stopped["status"], stopped["exit_code"]) == ("interrupted", 75), output.read_text()
    assert 1 <= stopped["steps"] < 12
    assert json.loads((run / "manifest.json").read_text())["world_size"] == 2

    (tmp_path / "hosts").write_text("localhost slots=2\n")
    options = ["--hostfile", tmp_path / "hosts", "--port", free_port()]
    deepspeed = start([*launcher("deepspeed", *options), *words], tmp_path)
    assert deepspeed.wait(PATIENCE_S) == 0, output.read_text()
    resumed = f"resumed from {run / 'checkpoints'}/step_{stopped['steps']} at step {stopped['steps']}"
    assert resumed in output.read_text()
    assert resumed in logged(run)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)


KILLED = """
import os, sys

if os.environ.get("RANK") == "1" and not os.path.exists("{once}"):
    open("{once}", "w").close()
    sys.path.append("{tests}")
    from launch import signal, signal_at

    signal_at("nsa_train.parallel.engine:Engine", "backward", 15, signal.SIGKILL)
"""


@pytest.mark.parametrize("restarts", [0, 1])
def test_kill_9_of_a_rank_inside_a_step_ends_the_job_soon_and_it_goes_on_bit_for_bit(
    restarts, words, train_ranks, tmp_path, monkeypatch
):
    """With the same line, or by torchrun itself."""
    words += ["trainer.micro_rows=1"]  # two micro-batches a step and rank: the 15th is the first of step 8
    undisturbed = train_ranks(2, *words, "name=undisturbed")
    assert [job.wait() for job in undisturbed] == [0, 0], undisturbed[0].text
    tests = Path(__file__).parent
    (tmp_path / "sitecustomize.py").write_text(KILLED.format(once=tmp_path / "once", tests=tests))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{tests.parent}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    run, output = tmp_path / "run", tmp_path / "output"
    command = [*launcher("torchrun", "--processes", 2, "--restarts", restarts), *words]
    job = start(command, tmp_path)
    try:
        wait_until(lambda: has_step(run, 7) or job.poll() is not None)
        assert job.wait(SOON_S) == (0 if restarts else 1), output.read_text()
    finally:
        job.kill()
    if not restarts:
        assert start(command, tmp_path).wait(PATIENCE_S) == 0, output.read_text()
    assert f"resumed from {run / 'checkpoints'}/step_6 at step 6" in output.read_text()
    assert rows(run) == rows(tmp_path / "undisturbed")


# Slurm, whose commands are played by scripts --------------------------------------------------------------------------

TASKS = """#!{python}
# srun: start the tasks on this node, hand them the signals that Slurm sends to a step, stop all of them when one fails,
# end with the largest code.
import os, signal, subprocess, sys, time
options = [word for word in sys.argv[1:] if word.startswith("--")]
output = dict(option[2:].split("=") for option in options)["output"].replace("%N", "node")
tasks = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda received, _: [task.send_signal(received) for task in tasks])
for number in range(int(os.environ["SLURM_NTASKS"])):
    place = {{"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}}
    command = sys.argv[1 + len(options):]
    tasks.append(subprocess.Popen(command, env=os.environ | place, stdout=open(output, "a"), stderr=subprocess.STDOUT))
open("{folder}/srun.pid", "w").write(str(os.getpid()))
while not any(task.poll() for task in tasks) and None in [task.poll() for task in tasks]:
    time.sleep(0.05)
[task.terminate() for task in tasks if task.poll() is None]
sys.exit(max(task.wait() for task in tasks))
"""
ENDING = """#!/bin/sh
echo "$SRUN_CPUS_PER_TASK" > {folder}/cpus
[ -z "{code}" ] || echo '{{"exit_code": {code}}}' > {folder}/run/summary.json
[ -z "{code}" ] || touch -r {folder}/tmp/* {folder}/run/summary.json # as if all of this took no time
exit {tasks}
"""
FAILING = """
import os, time
if rank := os.environ.get("SLURM_PROCID"):
    from nsa_train.errors import StorageError
    from nsa_train.train import loop

    def planted(*_):
        if rank == "1":
            raise StorageError("planted")
        time.sleep(1000)

    loop.Loader = planted
"""
CONTROL = """#!/bin/sh
case "$1" in
    show) echo 127.0.0.1 ;;
    requeue) echo "$2" >> {folder}/requeued ;;
esac
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Environment of a batch script in a job of two tasks; call it with what srun does."""

    def play(srun, **facts):
        (tmp_path / "bin").mkdir()
        for name, text in (("srun", srun), ("scontrol", CONTROL)):
            (tmp_path / "bin" / name).write_text(text.format(folder=tmp_path, python=sys.executable, **facts))
            (tmp_path / "bin" / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        for name, value in {"JOB_ID": free_port() % 20000, "NTASKS": 2, "JOB_NODELIST": "node"}.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))
        monkeypatch.setenv("SLURM_SUBMIT_DIR", str(SCRIPTS.parent))
        (tmp_path / "tmp").mkdir()
        monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))

    return play


def requeued(tmp_path):
    return (tmp_path / "requeued").read_text().split() if (tmp_path / "requeued").exists() else []


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_preempted_slurm_job_requeues_itself_and_goes_on_with_the_same_losses(number, words, slurm, tmp_path, whole):
    slurm(TASKS)
    run, output, ids = tmp_path / "run", tmp_path / "output", [os.environ["SLURM_JOB_ID"]]
    job = start([*launcher("slurm"), *words], tmp_path)
    try:
        wait_until(lambda: has_step(run, 1) or job.poll() is not None)
        for process in (job.pid, int((tmp_path / "srun.pid").read_text())):  # the script's, and the tasks'
            os.kill(process, number)
        assert job.wait(PATIENCE_S) == 75, output.read_text() + logged(run)
    finally:
        job.kill()
    assert requeued(tmp_path) == ids
    again = start([*launcher("slurm"), *words], tmp_path)
    assert again.wait(PATIENCE_S) == 0, output.read_text() + logged(run)
    assert requeued(tmp_path) == ids
    assert "resumed from" in (run / "logs" / "node.log").read_text()
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)


def test_a_rank_that_fails_while_they_start_ends_a_slurm_job_for_good(words, slurm, tmp_path, monkeypatch):
    """srun stops the others, which are in the middle of something; rank 0 writes the end of the run."""
    slurm(TASKS)
    (tmp_path / "sitecustomize.py").write_text(FAILING)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    job = start([*launcher("slurm"), *words], tmp_path)
    assert job.wait(PATIENCE_S) == 20, (tmp_path / "output").read_text() + logged(tmp_path / "run")
    assert (summary(tmp_path / "run")["status"], summary(tmp_path / "run")["exit_code"]) == ("failed", 20)
    assert "rank 1 failed first: planted" in logged(tmp_path / "run")
    assert requeued(tmp_path) == []


@pytest.mark.parametrize(
    ("tasks", "code", "end", "again"),
    [
        (75, 75, 75, True),
        (137, 75, 75, True),  # a task that took too long to end after the checkpoint
        (1, 19, 19, True),
        (137, 19, 19, True),
        (75, 18, 18, False),
        (75, 17, 17, False),
        (75, 20, 20, False),
        (1, 1, 1, False),
        (75, "", 1, False),  # stopped before there was a run, because another task failed
    ],
)
def test_what_srun_and_the_run_say_decides_whether_a_slurm_job_is_requeued(
    tasks, code, end, again, words, slurm, tmp_path
):
    slurm(ENDING, tasks=tasks, code=code)
    done = subprocess.run([*launcher("slurm"), *words], capture_output=True, text=True, check=False)
    assert done.returncode == end, done.stderr
    assert bool(requeued(tmp_path)) == again


def end_again(words, launch, monkeypatch):
    """One more launch of a job that Slurm has restarted so often; its standard error."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(launch))
    return subprocess.run([*launcher("slurm"), *words], capture_output=True, text=True, check=False).stderr


@pytest.mark.parametrize("code", [75, 19])
def test_a_slurm_job_is_not_requeued_after_three_launches_in_a_row_without_a_new_checkpoint(
    code, words, slurm, tmp_path, monkeypatch
):
    torn = "mkdir -p {folder}/run/checkpoints/step_9.tmp-$SLURM_RESTART_COUNT\nexit {tasks}"
    slurm(ENDING.replace("exit {tasks}", torn), tasks=1, code=code)
    (tmp_path / "run" / "checkpoints" / "step_6").mkdir(parents=True)  # of an earlier job
    said = [end_again(words, launch, monkeypatch) for launch in range(3)]
    assert len(requeued(tmp_path)) == 2
    assert said[:2] == ["", ""]
    assert f"not requeued: 3 launches in a row ended without a new checkpoint in {tmp_path / 'run'}" in said[2]
    assert end_again(words, 0, monkeypatch) == ""  # somebody has looked, and submits it again
    assert len(requeued(tmp_path)) == 3


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_slurm_job_is_requeued_as_often_as_it_makes_checkpoints(elsewhere, words, slurm, tmp_path, monkeypatch):
    """Here every second launch makes one."""
    if elsewhere:
        for folder in ("run", "large_disk"):
            (tmp_path / folder).mkdir()
        (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "large_disk")
    saved = "mkdir -p {folder}/run/checkpoints/step_$((SLURM_RESTART_COUNT / 2 + 9))\nexit {tasks}"
    slurm(ENDING.replace("exit {tasks}", saved), tasks=1, code=75)
    assert [end_again(words, launch, monkeypatch) for launch in range(8)] == [""] * 8
    assert len(requeued(tmp_path)) == 8


def test_tasks_under_slurm_get_the_cores_of_the_job(words, slurm, tmp_path, monkeypatch):
    slurm(ENDING, tasks=1, code=1)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    subprocess.run([*launcher("slurm"), *words], capture_output=True, check=False)
    assert (tmp_path / "cpus").read_text() == "6\n"


# Before anything starts -----------------------------------------------------------------------------------------------


def options_of(name, tmp_path):
    (tmp_path / "hosts").write_text("one slots=2\n# two slots=8\nthree slots=1\n")
    return {
        "torchrun": ["--nodes", 3, "--processes", 1, "--head", "one:29400"],
        "deepspeed": ["--hostfile", tmp_path / "hosts"],
        "slurm": [],
    }[name]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("torchrun", "--rdzv-endpoint one:29400 --rdzv-id run --nproc-per-node 1 -m nsa_train train"),
        ("deepspeed", "--no_local_rank --module nsa_train train"),
        ("slurm", "--output={run}/logs/%N.log"),
    ],
)
def test_a_dry_run_shows_what_it_would_start_and_starts_nothing(name, shown, words, tmp_path):
    command = launcher(name, "--dry-run", *options_of(name, tmp_path))
    rows = f"trainer.batch_rows={8 if name == 'slurm' else 3}"
    done = subprocess.run([*command, *words, rows], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert shown.format(run=tmp_path / "run") in done.stdout
    assert rows in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["torchrun", "deepspeed", "slurm"])
def test_a_launcher_refuses_a_wrong_configuration_before_anything_starts(name, words, tmp_path):
    command = launcher(name, *options_of(name, tmp_path))
    done = subprocess.run([*command, *words, "trainer.step=1"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "2 problems in the configuration" in done.stderr
    assert f"is not a multiple of the {8 if name == 'slurm' else 3} processes" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (launcher("torchrun", "--nodes", 2), "--nodes 2 needs --head"),
        (launcher("torchrun", "--nodes", 2, "--head", "one"), "needs --head HOST:PORT, where they meet, not 'one'"),
        (launcher("deepspeed"), "--hostfile '' names no node"),
        (launcher("deepspeed", "--hostfile", "/nowhere"), "--hostfile '/nowhere' names no node"),
        (launcher("slurm", "trainer.steps=1"), "this is no Slurm job; start it with sbatch"),
        *((launcher("torchrun", option), f"{option} needs a value") for option in ("--processes", "--nodes", "--head")),
        *((launcher("deepspeed", option), f"{option} needs a value") for option in ("--hostfile", "--port")),
        (launcher("torchrun", "--processes", 0), "--processes '0' must be a whole number from 1 to 65535"),
        (launcher("torchrun", "--processes", -1), "--processes '-1' must be a whole number from 1"),
        (launcher("torchrun", "--processes", "08"), "--processes '08' must be a whole number from 1"),
        (launcher("torchrun", "--nodes", "x"), "--nodes 'x' must be a whole number from 1"),
        (launcher("torchrun", "--restarts", "x"), "--restarts 'x' must be a whole number from 0"),
        (launcher("deepspeed", "--port", 65536), "--port '65536' must be a whole number from 1"),
        *((launcher(name, "--nice"), "there is no option '--nice'") for name in ("torchrun", "deepspeed", "slurm")),
    ],
)
def test_a_launcher_says_what_it_lacks(command, said):
    refused(command, said)


def refused(command, said, **variables):
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "unbound" not in done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("SLURM_NTASKS", "x", "SLURM_NTASKS 'x' must be a whole number"),
        ("SLURM_SUBMIT_DIR", "/nowhere", "start it with sbatch from the checkout's root, not from /nowhere"),
        ("PYTHON", "/bin/true", "/bin/true names no run folder"),
    ],
)
def test_a_launcher_refuses_an_environment_in_which_it_cannot_know_the_run(variable, value, said):
    refused(launcher("slurm", "--dry-run"), said, **{variable: value})


@pytest.mark.parametrize("name", ["torchrun", "deepspeed", "slurm"])
def test_launcher_options_stand_before_the_words_of_the_run(name, words, tmp_path):
    refused(launcher(name, "--dry-run", *options_of(name, tmp_path), *words, "--dry-run"), "stand before key=value")


@pytest.mark.parametrize("name", ["torchrun", "deepspeed", "slurm"])
def test_a_launcher_asked_for_help_shows_its_line_and_starts_nothing(name):
    done = subprocess.run(launcher(name, "--help"), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"scripts/train_{name}.sh" in done.stdout
    assert "[key=value ...]" in done.stdout
    assert "SBATCH" not in done.stdout
    assert "starting" not in done.stdout


def test_the_logs_of_a_run_without_runs_dir_lie_beside_it(words, tmp_path):
    """Not in the root of the file system."""
    command = launcher("torchrun", "--dry-run", "--processes", 1)
    done = subprocess.run([*command, *words, "runs_dir="], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("log: run/logs/")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["train", "trainer.step=5", "attention=nsaa"], 2, "there are full, full_gated, full_gated_wide, nsa, "),
        (["trian"], 2, "invalid choice: 'trian'"),
        ([], 2, "COMMAND"),
    ],
)
def test_exit_codes_reach_the_shell(words, code, said):
    done = subprocess.run([*ALONE, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
