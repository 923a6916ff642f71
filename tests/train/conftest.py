"""One small corpus, and runs that many tests start from."""

import json
import shutil
import sysconfig
from functools import partial
from pathlib import Path

import launch
import pytest

MODULES = ("abc", "bisect", "cmd", "copy", "csv", "fnmatch", "glob", "heapq", "keyword", "queue", "sched", "shlex")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Overrides for a corpus of real text, some thousand tokens long; the first run prepares it."""
    root = tmp_path_factory.mktemp("corpus")
    texts = ((Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text("utf-8") for name in MODULES)
    records = [{"text": text[:900], "source": "odd" if i % 2 else "even"} for i, text in enumerate(texts)]
    (root / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return [
        "data=files", f"data.root={root}", "data.paths=[corpus.jsonl]", f"data.prepared_dir={root / 'prepared'}",
        "data.heldout_share=0.3", "data.max_documents=4",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def start_run(corpus):
    """Start `nsa_train train` in `runs_dir`; keywords as in Job. The run is called `run` unless an override says so."""

    def start(runs, *overrides, output=None, **how):
        words = ["train", *launch.SMALL, *corpus, f"runs_dir={runs}", "name=run", *overrides]
        return launch.Job(words, output or runs / "output", **how)

    return start


@pytest.fixture
def train(start_run, tmp_path):
    """`start_run` in the test's own folder or in `runs`; what still runs at the test's end is killed."""
    jobs = []

    def start(*overrides, runs=tmp_path, **how):
        jobs.append(start_run(runs, *overrides, output=tmp_path / f"output{len(jobs)}", **how))
        return jobs[-1]

    yield start
    for job in jobs:
        job.process.kill()


@pytest.fixture
def train_ranks(train):
    """Start all processes of one run, with the environment that torchrun would give them and `extra`."""

    def start(world, *overrides, extra=None, **how):
        environments = launch.rank_environments(world)
        return [train(*overrides, environment=one | (extra or {}), **how) for one in environments]

    return start


@pytest.fixture(scope="session")
def kept(start_run, tmp_path_factory):
    """Run to an end once per session: runs_dir of the run, by the step of its kill, None for the whole run."""
    made = {}

    def at(call):
        if call not in made:
            folder = tmp_path_factory.mktemp("kept")
            before = call and partial(
                launch.signal_at, "nsa_train.parallel.engine:Engine", "backward", call, launch.signal.SIGKILL
            )
            job = start_run(folder, before=before)
            assert job.wait() == (-9 if call else 0), job.text
            made[call] = folder / "run"
        return made[call]

    return at


@pytest.fixture(scope="session")
def whole(kept):
    """Folder of an uninterrupted run."""
    return kept(None)


@pytest.fixture
def killed(kept, tmp_path):
    """Folder of a copy of a run that was killed inside step 8, with checkpoints of steps 3 and 6."""
    shutil.copytree(kept(2 * launch.MICRO_BATCHES * 4 - 1), tmp_path / "run")
    return tmp_path / "run"
