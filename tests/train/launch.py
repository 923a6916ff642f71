"""Training runs as real processes: real signals, real exit codes, real files.

What runs in them is the command line's own `main`. test_launchers.py starts the same runs as `python -m nsa_train` and
by torchrun.
"""

import json
import os
import pkgutil
import signal
import socket
import sys
import time
import traceback

from server import SERVER

PATIENCE_S = 120
# Sizes at which a step takes a tenth of a second, while rows hold several documents, queries cannot read all blocks,
# a step has two micro-batches, and an epoch ends before the run does.
SMALL = [
    "model.vocab=400", "model.layers=2", "model.width=32", "model.heads=2", "model.kv_heads=1", "model.key_dim=16",
    "model.value_dim=16", "moe.experts=4", "moe.expert_width=16", "attention.cmp_block=8", "attention.cmp_stride=4",
    "attention.slc_block=8", "attention.slc_count=4", "attention.window=16", "trainer.seq_len=96",
    "trainer.batch_rows=4", "trainer.micro_rows=2", "trainer.steps=12", "trainer.log_every=1", "trainer.val_every=4",
    "trainer.val_rows=5", "trainer.checkpoint_every=3", "trainer.export=false", "logging.wandb=disabled",
]  # fmt: skip
CHECKPOINT_EVERY, STEPS, MICRO_BATCHES = 3, 12, 2
MEASURED = ("tokens_per_s", "data_wait_ms", "mem_gib")  # of the machine, not of the training


class Job:
    """A started process; its output is in a file."""

    def __init__(self, arguments, output, environment=None, before=None):
        self.output = output
        self.process = SERVER.Process(
            target=_run, args=([str(word) for word in arguments], output, environment or {}, before), daemon=True
        )
        self.process.start()

    def wait(self):
        """The exit code; minus the signal's number for a killed process."""
        self.process.join(PATIENCE_S)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running after {PATIENCE_S} s:\n{self.text}")
        return self.process.exitcode

    def send(self, number):
        os.kill(self.process.pid, number)

    @property
    def text(self):
        return self.output.read_text()


def _run(arguments, output, environment, before):
    os.environ.update(environment)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    if before:
        before()
    from nsa_train.cli import main

    sys.exit(main(arguments))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environments(world):
    """What torchrun would set for each of `world` processes."""
    port = str(free_port())
    return [
        {
            "RANK": str(r),
            "LOCAL_RANK": str(r),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for r in range(world)
    ]


def on_ranks(world, work):
    """Call `work` in each of `world` processes of a group."""
    jobs = [SERVER.Process(target=_as_rank, args=(one, work), daemon=True) for one in rank_environments(world)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(PATIENCE_S)
        job.kill()
    assert [job.exitcode for job in jobs] == [0] * world


def _as_rank(environment, work):
    import torch

    from nsa_train.parallel.engine import start_processes, stop_processes

    os.environ.update(environment)
    start_processes(torch.device("cpu"), PATIENCE_S)
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the others may wait for this rank
    stop_processes()


def wait_until(happened, job=None):
    """Poll until it happened; an error once the job has ended without it, or patience is at its end."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        assert job is None or job.process.is_alive() or happened(), f"ended without it:\n{job.text}"
        time.sleep(0.02)


# What a test does to a process before its command starts --------------------------------------------------------------


def signal_at(owner, name, call, number):
    """Send the process a signal at the start of the `call`-th call of a function, counted from 1, by the training."""
    holder = pkgutil.resolve_name(owner)
    original, calls = getattr(holder, name), []

    def counted(*args, **kwargs):
        caller = sys._getframe(1)
        while caller.f_code.co_name == "counted":
            caller = caller.f_back
        if caller.f_code.co_name == "probe_engine":
            return original(*args, **kwargs)
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(holder, name, counted)


def interrupt_twice(owner, name, call):
    """A Ctrl-C at the `call`-th call of a function, and another one at once, for a user of little patience."""
    from nsa_train.train import guards

    guards.SAME_CTRL_C_S = -1.0
    signal_at(owner, name, call, signal.SIGINT)
    signal_at(owner, name, call, signal.SIGINT)


def name_device(name):
    """The machine's device is called so."""
    from nsa_train import runtime

    runtime.device_name = lambda: name


def spoil_losses(ranks, steps, factor=float("nan")):
    """The losses of these ranks are multiplied in these steps, counted from 1."""
    from nsa_train import runtime
    from nsa_train.model.transformer import Transformer

    forward, calls = Transformer.forward, []

    def spoiled(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if not self.training:
            return out
        micro_batches = MICRO_BATCHES // runtime.world_size()
        calls.append(None)
        step = (len(calls) - 1) // micro_batches + 1
        return out._replace(token_losses=out.token_losses * factor) if step in steps else out

    if runtime.rank() in ranks:
        Transformer.forward = spoiled


def limit_file_size(number_of_bytes, ranks=(0,)):
    """Writing more than this into one file fails as on a full disk."""
    import resource

    if int(os.environ.get("RANK", "0")) not in ranks:
        return
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number_of_bytes, number_of_bytes))


def limit_file_size_at(owner, name, number_of_bytes):
    """The same from the first call of a function on."""
    holder = pkgutil.resolve_name(owner)
    original = getattr(holder, name)

    def limited(*args, **kwargs):
        limit_file_size(number_of_bytes)
        return original(*args, **kwargs)

    setattr(holder, name, limited)


def close_output():
    """Standard output is a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)
    os.close(writer)


# What a run has left --------------------------------------------------------------------------------------------------


def rows(folder):
    """Lines of metrics.jsonl without what depends on the machine's speed; no (split, step) may be there twice."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    places = [(row["split"], row["step"]) for row in found]
    assert len(set(places)) == len(places), f"a step is there twice: {places}"
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in found]


def losses(folder):
    """Loss by split and step, of the positions and sources too."""
    return {
        (row["split"], row["step"], part): value
        for row in rows(folder)
        for part, value in {"all": row["loss"], **row.get("by_position", {}), **row.get("by_source", {})}.items()
    }


def has_step(folder, step):
    path = folder / "metrics.jsonl"
    return path.exists() and f'"step": {step},' in path.read_text()


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def contents(folder):
    """Bytes of every file below a folder by relative path, without the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
