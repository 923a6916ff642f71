"""The same runs as a user starts them: `python -m nsa_train` and torchrun, in processes of their own."""

import json
import os
import signal
import subprocess
import sys

import pytest
from launch import PATIENCE_S, SMALL, free_port, has_step, losses, summary, wait_until

pytestmark = pytest.mark.process
ALONE = [sys.executable, "-m", "nsa_train"]


def start(command, tmp_path):
    """A process at the head of its own group, as a terminal would start it; its output goes to a file."""
    with (tmp_path / "output").open("a") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def test_ctrl_c_under_torchrun_with_two_processes_and_on_with_one(corpus, tmp_path, whole):
    run, output = tmp_path / "run", tmp_path / "output"
    words = ["train", *SMALL, *corpus, f"runs_dir={tmp_path}", "name=run"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    two = start([*torchrun, "-m", "nsa_train", *words], tmp_path)
    try:
        wait_until(lambda: has_step(run, 1) or two.poll() is not None)
        os.killpg(two.pid, signal.SIGINT)
        assert two.wait(PATIENCE_S) != 0, output.read_text()
    finally:
        two.kill()
    stopped = summary(run)
    assert (stopped["status"], stopped["exit_code"]) == ("interrupted", 75), output.read_text()
    assert 1 <= stopped["steps"] < 12
    assert json.loads((run / "manifest.json").read_text())["world_size"] == 2

    one = start([*ALONE, *words], tmp_path)
    assert one.wait(PATIENCE_S) == 0, output.read_text()
    assert (
        f"resumed from {run / 'checkpoints'}/step_{stopped['steps']} at step {stopped['steps']}" in output.read_text()
    )
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)


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
