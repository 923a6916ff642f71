"""The script that trains the arms of a comparison picks learning rates from runs that are there."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from folders import make_run
from helpers import load_script

from nsa_train.bench.results import write_result
from nsa_train.cli import main
from nsa_train.compare.runs import Run
from nsa_train.errors import Interrupted

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "compare_arms.py"


def start(*words):
    return subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, check=False)


SWEEP = ["trainer.steps=6", "data.prepared_dir=none"]


def swept(tmp_path, losses):
    """Finished runs of a sweep, found and not repeated; None: it diverged."""
    for (arm, lr), loss in losses.items():
        ending = {"val_loss_last": loss} if loss else {"status": "failed", "exit_code": 18}
        run = make_run(tmp_path, arm, overrides=[f"name=tiny-{arm}-lr{lr:g}", f"optim.lr={lr}", *SWEEP], summary=ending)
        assert run.name == f"tiny-{arm}-lr{lr:g}"
    lrs = sorted({lr for _, lr in losses})
    return start("sweep", "--arms", *dict.fromkeys(arm for arm, _ in losses), "--lrs", *lrs, "--set", *SWEEP,
                 f"runs_dir={tmp_path}", "seed=0")  # fmt: skip


def test_a_sweep_takes_the_lowest_held_out_loss_and_tells_of_the_edge(tmp_path):
    losses = {("full", 1e-3): 5.0, ("full", 2e-3): 4.9, ("full", 4e-3): 5.1,
              ("nsa", 1e-3): 5.0, ("nsa", 2e-3): 4.9, ("nsa", 4e-3): 4.8}  # fmt: skip
    done = swept(tmp_path, losses)
    said = done.stdout
    assert done.returncode == 0, done.stderr
    assert "full: best learning rate 0.002 of 0.001: 5.0000, 0.002: 4.9000, 0.004: 5.1000\n" in said
    assert "nsa: best learning rate 0.004 of" in said
    assert said.count("at the edge: extend --lrs") == 1
    rows = json.loads((tmp_path / "tiny-lr.json").read_text())["rows"]
    assert [(row["arm"], row["lr"], row["at_edge"]) for row in rows] == [("full", 2e-3, False), ("nsa", 4e-3, True)]


def test_a_sweep_keeps_the_rows_of_other_arms(tmp_path):
    for arm, losses in {"full": (4.9, 5.0), "nsa": (4.8, 4.7), "window": (5.5, 5.4)}.items():
        assert swept(tmp_path, {(arm, 1e-3): losses[0], (arm, 2e-3): losses[1]}).returncode == 0
    assert swept(tmp_path, {("full", 1e-3): 5.0, ("full", 2e-3): 4.5}).returncode == 0
    rows = json.loads((tmp_path / "tiny-lr.json").read_text())["rows"]
    assert {row["arm"]: row["lr"] for row in rows} == {"nsa": 2e-3, "window": 2e-3, "full": 2e-3}


def test_a_sweep_that_is_stopped_keeps_what_it_knows_of_whole_arms(tmp_path, monkeypatch):
    def stop(jobs):
        raise Interrupted("stopped, checkpoints written; the same command goes on")

    script, queue = load_script("compare_arms", monkeypatch), SimpleNamespace(train=stop)
    words, path = [*SWEEP, f"runs_dir={tmp_path}", "seed=0"], tmp_path / "tiny-lr.json"
    for finished in ([], [("nsa", 1e-3)], [("full", 1e-3), ("full", 2e-3)]):
        for arm, lr in finished:
            make_run(tmp_path, arm, overrides=[f"name=tiny-{arm}-lr{lr:g}", f"optim.lr={lr}", *SWEEP],
                     summary={"val_loss_last": 5.0 - 100 * lr})  # fmt: skip
        assert not path.exists()
        with pytest.raises(Interrupted, match="the same command goes on"):
            script.sweep(queue, ["nsa", "full"], [1e-3, 2e-3], words)
    assert [(row["arm"], row["lr"]) for row in json.loads(path.read_text())["rows"]] == [("full", 2e-3)]


def test_a_rate_that_diverges_is_worse_than_any(tmp_path):
    done = swept(tmp_path, {("full", 1e-3): 9.0, ("full", 2e-3): None})
    assert done.returncode == 0, done.stderr
    assert "full: best learning rate 0.001 of 0.001: 9.0000, 0.002: diverged; at the edge" in done.stdout
    assert swept(tmp_path, {("nsa", 1e-3): 5.0, ("nsa", 2e-3): 4.9, ("nsa", 4e-3): None}).returncode == 0
    rows = json.loads((tmp_path / "tiny-lr.json").read_text())["rows"]
    assert [(row["arm"], row["lr"], row["at_edge"]) for row in rows] == [("full", 1e-3, True), ("nsa", 2e-3, False)]
    assert "diverged with every learning rate" in swept(tmp_path, {("window", 1e-3): None}).stderr


def test_finished_runs_are_asked_and_compared_even_where_they_cannot_answer(tmp_path):
    names = {arm: make_run(tmp_path, arm, overrides=[f"name=tiny-{arm}-seed0", *SWEEP]) for arm in ("full", "nsa")}
    (names["full"] / "eval").mkdir()
    answer = {"what": "summary", "task": "needle", "length": 512, "settings": {"corpus_hash": "c", "samples": 20}}
    (names["full"] / "eval" / "needle.json").write_text(json.dumps({"rows": [answer | {"samples": 0}]}))
    done = start("run", "--arms", *names, "--eval", "needle", "--out", tmp_path / "out", "--set", *SWEEP,
                 f"runs_dir={tmp_path}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 of 2 runs are finished" in done.stdout
    assert "tiny-nsa-seed0: exit code 2" in done.stdout
    assert "no export of a finished run" in (names["nsa"] / "console.log").read_text()
    assert (tmp_path / "out" / "comparison_tiny.md").is_file()


def test_tasks_that_do_not_fit_an_arm_are_not_asked_of_it(tmp_path):
    names = {arm: make_run(tmp_path, arm, overrides=[f"name=tiny-{arm}-seed0", *SWEEP])
             for arm in ("full", "window", "nsa_random", "nsa")}  # fmt: skip
    words = ["run", "--arms", *names, "--out", tmp_path / "out", "--set", *SWEEP, f"runs_dir={tmp_path}"]
    done = start(*words, "--eval", "blocks")
    assert done.returncode == 0, done.stderr
    assert "3 of 4 runs are finished" in done.stdout
    assert "tiny-nsa-seed0: eval" in done.stdout
    done = start(*words, "--eval", "maps", "--lengths", "128,256")
    assert "1 of 4 runs are finished" in done.stdout
    assert "no export of a finished run" in (names["nsa_random"] / "console.log").read_text()


def test_a_task_that_there_is_not_is_told_before_training(tmp_path):
    done = start("run", "--arms", "full", "nsa", "--eval", "needles", "--set", f"runs_dir={tmp_path}")
    assert done.returncode == 2
    assert "invalid choice: 'needles'" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gates", "missing.json"], "--gates missing.json: cannot be read"),
        (["--name", "a/b"], "--name 'a/b' may hold letters"),
        (["--eval", "needle", "--lengths", "8k"], "lengths=8k must be numbers from 1 on"),
        (["--eval", "needle", "--samples", "4,5"], "samples=4,5 must be a number from 1 on"),
        (["--eval", "needle", "--lengths", "256,99999999"], "lengths=99999999 is beyond the model's max_seq_len"),
        (["--lengths", "256", "--words", "train"], "lengths=256, words=train: how --eval asks, and it is not given"),
        (["--samples", "4"], "samples=4: how --eval asks, and it is not given"),
    ],
)
def test_what_the_report_could_not_use_is_told_before_training(words, message, tmp_path):
    done = start("run", "--arms", "full", "nsa", *words, "--set", f"runs_dir={tmp_path}")
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_an_arm_and_a_seed_that_are_named_twice_are_trained_once(tmp_path):
    for arm in ("full", "nsa"):
        make_run(tmp_path, arm, overrides=[f"name=tiny-{arm}-seed0", *SWEEP])
    words = ["--arms", "full", "nsa", "nsa", "--seeds", "0", "0", "--out", tmp_path / "out"]
    done = start("run", *words, "--set", *SWEEP, f"runs_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "2 of 2 runs are finished" in done.stdout


def test_rates_of_a_sweep_must_name_the_arm(tmp_path):
    write_result("lr", "sweep", [{"arm": "full", "lr": 0.002}], folder=tmp_path)
    words = ["run", "--arms", "full", "nsa", "--rates", tmp_path / "lr.json", "--set", f"runs_dir={tmp_path}"]
    done = start(*words)
    assert done.returncode == 2
    assert "no learning rate for nsa; sweep these arms too" in done.stderr


def test_the_rates_of_a_sweep_are_taken_and_those_at_an_edge_refused(tmp_path):
    lrs = {"full": 1e-3, "nsa": 2e-3, "window": 2e-3}
    for arm, lr in lrs.items():
        make_run(tmp_path, arm, overrides=[f"name=tiny-{arm}-seed0", f"optim.lr={lr}", *SWEEP])
    row = {"at_edge": False, "losses": {"0.001": 5.0, "0.002": 5.0}, "set": ["seed=100", "trainer.steps=3"]}
    rows = [{**row, "arm": arm, "lr": lrs[arm]} for arm in ("full", "nsa")]
    write_result("lr", "sweep", rows, folder=tmp_path)
    words = ["run", "--arms", *lrs, "--rates", tmp_path / "lr.json", "--out", tmp_path / "out", "--set", *SWEEP,
             f"runs_dir={tmp_path}"]  # fmt: skip
    done = start(*words)
    assert done.returncode == 0, done.stderr
    assert "window: learning rate 0.002 of nsa, for want of a sweep of its own\n" in done.stdout
    assert "3 of 3 runs are finished" in done.stdout
    assert "## Learning rates" in (tmp_path / "out" / "comparison_tiny.md").read_text()
    write_result("lr", "sweep", [rows[0], {**rows[1], "at_edge": True}], folder=tmp_path)
    done = start(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "nsa: the best rate 0.002 lies at the edge; go on with" in done.stderr


def test_runs_are_kept_with_their_answers_and_not_repeated_where_only_the_files_are(tmp_path):
    runs = [make_run(tmp_path, arm, overrides=[f"name=tiny-{arm}-seed0", *SWEEP]) for arm in ("full", "nsa")]
    (runs[1] / "eval").mkdir()
    cell = {"what": "cell", "task": "needle", "length": 512, "depth": 0.5, "zone": None, "accuracy": 0.5}
    (runs[1] / "eval" / "needle.json").write_text(json.dumps({"rows": [cell]}))
    kept, words = tmp_path / "kept", ["run", "--arms", "full", "nsa", "--keep", tmp_path / "kept"]
    words += ["--set", *SWEEP, f"runs_dir={tmp_path}"]
    done = start(*words, "--out", tmp_path / "first")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": kept in ") == 2
    assert Run.read(kept / "tiny-nsa-seed0.json.xz").evaluations == [cell]
    for run in runs:
        shutil.rmtree(run)
    done = start(*words, "--eval", "needle", "--out", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert "2 of 2 runs are finished" in done.stdout
    one, other = (json.loads((tmp_path / out / "comparison_tiny.json").read_text()) for out in ("first", "again"))
    assert [row["what"] for row in one["rows"]] == [row["what"] for row in other["rows"]]
    done = start(*words, "trainer.steps=7")
    assert done.returncode == 2
    assert "keeps a run with another configuration; choose another --keep:\n  trainer.steps: 6 there, 7" in done.stderr


def test_answers_at_some_of_the_lengths_or_with_other_samples_are_not_all(tmp_path, monkeypatch):
    arms = load_script("compare_arms", monkeypatch)
    run = make_run(tmp_path, "nsa", overrides=["name=tiny-nsa-seed0", *SWEEP])
    (run / "eval").mkdir()
    settings = {"corpus_hash": "c", "samples": 20, "depths": 21}
    for task in ("needle", "maps"):
        rows = [{"what": "summary", "task": task, "length": 512, "settings": settings}]
        (run / "eval" / f"{task}.json").write_text(json.dumps({"rows": rows}))

    def left(*ways):
        words = [*SWEEP, f"runs_dir={tmp_path}", "attention=nsa"]
        split = [tuple(way.split()) for way in ways]
        return arms.Job.of("nsa-seed0", *words, tasks=["needle", "maps"], ways=split).command()

    assert left() == left("lengths=512") == []
    assert left("lengths=512,1024") == ["eval", str(run), "task=needle", "lengths=512,1024"]
    assert left("samples=20") == []
    assert left("samples=5") == ["eval", str(run), "task=needle,maps", "samples=5"]
    other_words = ["eval", str(run), "task=needle", "lengths=512", "words=train"]
    assert left("lengths=512 words=heldout", "lengths=512 words=train") == other_words
    (run / "eval" / "needle.json").rename(run / "eval" / "needle_train.json")
    assert left("lengths=512 words=train") == []
    assert left("lengths=512 words=train", "lengths=512 words=heldout") == [*other_words[:-1], "words=heldout"]


def test_every_way_of_asking_reaches_the_runs(tmp_path, monkeypatch):
    script, asked = load_script("compare_arms", monkeypatch), []

    def stop(jobs):
        asked.extend(job.ways for job in jobs)
        raise Interrupted("stopped")

    monkeypatch.setattr(script, "Queue", lambda seconds, share: SimpleNamespace(train=stop))
    words = ["run", "--arms", "full", "--samples", "4", "--words", "heldout", "train", "--eval", "needle"]
    monkeypatch.setattr(sys, "argv", ["compare_arms.py", *words, "--set", *SWEEP, f"runs_dir={tmp_path}"])
    assert script.main() == Interrupted.exit_code
    assert asked == [(("samples=4", "words=heldout"), ("samples=4", "words=train"))]


def test_a_file_of_another_run_is_left_and_told(tmp_path):
    runs = [make_run(tmp_path, arm, overrides=[f"name=tiny-{arm}-seed0", *SWEEP]) for arm in ("full", "nsa")]
    assert main(["compare", "keep", *map(str, runs), "--out", str(tmp_path / "kept")]) == 0
    make_run(tmp_path, "nsa", gain=1.0, overrides=["name=tiny-nsa-seed0", *SWEEP])
    words = ["--keep", tmp_path / "kept", "--out", tmp_path / "out", "--set", *SWEEP, f"runs_dir={tmp_path}"]
    done = start("run", "--arms", "full", "nsa", *words)
    assert done.returncode == 0, done.stderr
    assert "tiny-nsa-seed0: not kept, " in done.stdout
    assert Run.read(tmp_path / "kept" / "tiny-nsa-seed0.json.xz").loss > 4.5


@pytest.fixture
def script(monkeypatch):
    """The script as a module. What it starts waits for a signal, and it leaves those of the tests alone."""
    module = load_script("compare_arms", monkeypatch)
    monkeypatch.setattr(module, "PROGRAM", (sys.executable, "-c", "import time; time.sleep(100)"))
    monkeypatch.setattr(module.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(module, "_devices", lambda: [None])
    return module


@pytest.mark.parametrize(("seconds", "took", "started"), [(1.0, [], 1), (50.0, [10.0, 60.0, 70.0], 0), (0.0, [], 0)])
def test_after_its_time_the_queue_stops_runs_and_begins_none_that_takes_longer(
    seconds, took, started, script, tmp_path, capsys
):
    job = SimpleNamespace(
        config=SimpleNamespace(name="one"), log=tmp_path / "log", command=lambda: ["eval"], keep=lambda: None
    )
    queue, began = script.Queue(seconds), time.monotonic()
    queue.took["eval"] = took
    with pytest.raises(Interrupted):
        queue.train([job, job])
    assert time.monotonic() - began < 30
    assert capsys.readouterr().out.count("one: eval\n") == started


def test_what_fits_into_the_time_left_is_begun(script):
    queue = script.Queue(50.0)
    queue.took = {"train": [60.0], "eval": [10.0, 20.0, 90.0]}
    assert queue._may_start("eval")
    assert not queue._may_start("train")


def test_a_device_takes_as_many_runs_at_once_as_are_asked_for_and_they_know_it(script, tmp_path, monkeypatch):
    told = tmp_path / "told"
    tell = f"open({str(told)!r}, 'a').write(os.environ['{script.runtime.RUNS_A_DEVICE}'])"
    wait = f"import os, time; {tell}; time.sleep(100)"
    monkeypatch.setattr(script, "PROGRAM", (sys.executable, "-c", wait))
    job = SimpleNamespace(
        config=SimpleNamespace(name="one"), log=tmp_path / "log", command=lambda: ["eval"], keep=lambda: None
    )
    queue = script.Queue(3.0, share=2)
    with pytest.raises(Interrupted):
        queue.train([job] * 3)
    assert told.read_text() == "22"
    # One that has the device to itself; or not, as the environment tells: of all runs there.
    for beside, jobs, says in (("1", 1, "1"), ("3", 1, "3"), ("3", 2, "33")):
        told.unlink()
        monkeypatch.setenv(script.runtime.RUNS_A_DEVICE, beside)
        queue = script.Queue(3.0, share=2)
        with pytest.raises(Interrupted):
            queue.train([job] * jobs)
        assert told.read_text() == says


def test_less_than_one_run_a_device_is_refused():
    done = start("sweep", "--arms", "nsa", "--lrs", "1e-3", "--per-gpu", "0")
    assert (done.returncode, done.stderr) == (2, "error: --per-gpu 0 must be 1 or more\n")
