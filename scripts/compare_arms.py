"""Train arms of a comparison, one run a GPU at a time or --per-gpu so many, and set them side by side.

python scripts/compare_arms.py sweep --arms full nsa --lrs 1e-3 2e-3 4e-3 \\
    --set experiment=r1 seed=100 trainer.steps=1000 schedule.warmup_share=0.3
python scripts/compare_arms.py run --arms full nsa --seeds 0 1 2 --rates runs/r1-lr.json --set experiment=r1

What --set says goes to every run. Ctrl-C, SIGTERM or the end of --until let the runs write checkpoints (exit code 75);
the same command goes on. Finished runs are not repeated, nor those that the folder of --keep has a file of. `sweep`
writes <runs_dir>/<experiment>-lr.json: each arm's best learning rate by held-out loss, whether it lies at the edge of
those that were tried, and what --set said; rows of other arms stay in it. `run` refuses a rate at an edge, and a sweep
of another recipe than its own; an ablation without a sweep takes the rate of the arm that it ablates.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any, NamedTuple

from nsa_train import runtime
from nsa_train.bench import results
from nsa_train.compare import kept
from nsa_train.compare.command import main as compare
from nsa_train.compare.command import read_gates
from nsa_train.compare.rates import Rates
from nsa_train.compare.runs import Run
from nsa_train.config.load import load_config
from nsa_train.config.schema import Config
from nsa_train.data.recall import WORDS
from nsa_train.errors import DivergedError, Interrupted, NsaTrainError, RunFolderError
from nsa_train.evaluate.command import BLOCKS, MAPS, TASKS, Options, answers_there, check_lengths, misfit
from nsa_train.train.folder import FREE_KEYS, RunFolder, differing

POLL_S = 0.2
PROGRAM = (sys.executable, "-m", "nsa_train")


@dataclass(frozen=True)
class Job:
    """A run to train, and what comes afterwards."""

    overrides: tuple[str, ...]
    config: Config
    tasks: tuple[str, ...]  # of `nsa-train eval`
    ways: tuple[tuple[str, ...], ...]  # of asking them: lengths, samples and words
    file: Path | None  # that keeps it

    @staticmethod
    def of(
        name: str, *overrides: str, tasks: Iterable[str] = (), ways: Iterable[tuple[str, ...]] = ((),),
        keep: Path | None = None,
    ) -> Job:  # fmt: skip
        """`name` follows the experiment's in the run's. Tasks that the arm does not fit are left out.

        Raises RunFolderError where the folder `keep` has the run with another configuration.
        """
        experiment = load_config(overrides).experiment
        words = (*overrides, f"name={experiment}-{name}")
        config = load_config(words)
        asked = tuple(task for task in tasks if not misfit(task, config.attention))
        file = keep and keep / f"{config.name}{kept.SUFFIX}"
        if file and file.exists():
            there, now = kept.recipe(Run.read(file).config), kept.recipe(config)
            differ = differing(there, now, (*FREE_KEYS, *kept.SAME_RESULT))
            lines = [f"  {key}: {a!r} there, {b!r} now" for key, (a, b) in differ.items()]
            if lines:
                raise RunFolderError(
                    f"{file} keeps a run with another configuration; choose another --keep:\n" + "\n".join(lines)
                )
        return Job(words, config, asked, tuple(ways), file)

    def command(self) -> list[str]:
        """What is to be done next, of `nsa-train`; empty: nothing."""
        if not self.trained:
            return [] if self.kept else ["train", *self.overrides]
        for way in self.ways:
            if left := [task for task in self.tasks if not self._answered(task, way)]:
                return ["eval", str(self.config.run_dir), f"task={','.join(left)}", *way]
        return []

    def _answered(self, task: str, way: tuple[str, ...]) -> bool:
        """Whether a task has its answers, of quizzes and `heldout` at every length that is asked for.

        Where `samples` are asked for, those with other ones count for nothing, nor do quizzes of other depths.
        """
        wanted, figure = Options.parse([f"task={task}", *way]), task in (BLOCKS, MAPS)
        file = self.config.run_dir / "eval" / f"{wanted.name_of(task)}.json"
        if not file.exists():
            return False
        strict = any(word.startswith("samples=") for word in way)
        alike = {"samples": wanted.samples, "depths": wanted.depths} if strict else {}
        there = {
            row.get("length") for row in answers_there(file)
            if (figure or "corpus_hash" in row.get("settings", ()))
            and alike.items() <= (alike | row.get("settings", {})).items()
        }  # fmt: skip
        return bool(there) and (figure or there >= {*wanted.lengths})

    def keep(self) -> None:
        """The run as far as it has come, with the evaluations that there are; says so where it cannot be kept."""
        try:
            if self.file and self.trained and Run.read(self.config.run_dir).keep(self.file.parent)[1]:
                print(f"{self.config.name}: kept in {self.file}", flush=True)
        except NsaTrainError as error:
            print(f"{self.config.name}: not kept, {error}", flush=True)

    @property
    def trained(self) -> bool:
        return self.summary.get("status") == "done"

    @property
    def diverged(self) -> bool:
        return self.summary.get("exit_code") == DivergedError.exit_code

    @property
    def kept(self) -> bool:
        return self.file is not None and self.file.exists()

    @property
    def path(self) -> Path:
        """What is known of the run: its folder, or, where that is not finished, the file that keeps it."""
        return self.file if self.file and self.kept and not self.trained else self.config.run_dir

    @property
    def summary(self) -> dict[str, Any]:
        """Of the run so far. Raises RunFolderError where the folder is in use, or holds another configuration."""
        folder = RunFolder(self.config)
        folder.claim()
        try:
            return folder.read_json("summary.json")
        finally:
            folder.release()

    @property
    def log(self) -> Path:
        return self.config.run_dir / "console.log"


class Running(NamedTuple):
    job: Job
    word: str  # train or eval
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    began: float


class Queue:
    """Trains jobs on the devices of this machine until none is left, a signal says stop, or `seconds` have passed.

    A device takes `share` runs at once.
    """

    def __init__(self, seconds: float, share: int = 1) -> None:
        self.end = time.monotonic() + seconds
        self.gpus, self.share = _devices(), share
        self.told = runtime.runs_a_device()  # by who starts other runs beside this queue
        self.running: dict[int, Running] = {}  # by their place on the GPUs, each as often as it is shared
        self.waiting: list[Job] = []
        self.took: dict[str, list[float]] = {"train": [], "eval": []}  # seconds of what succeeded
        self.stopped = False
        runtime.share_cores(len(self.gpus) * share)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def train(self, jobs: list[Job]) -> None:
        """Raises Interrupted when stopped. A run that fails is named, and does not keep the others from running."""
        self.waiting = [job for job in jobs if job.command()]
        self.share = max(1, min(self.share, math.ceil(len(self.waiting) / len(self.gpus))))
        places = self.gpus * self.share
        for job in jobs:
            job.keep()
        print(
            f"{len(jobs) - len(self.waiting)} of {len(jobs)} runs are finished, {len(places)} at a time",
            flush=True,
        )
        untrained = [job for job in self.waiting if job.command()[:1] == ["train"]]
        if untrained:  # the corpus once, before many would wait for it
            code = subprocess.run([*PROGRAM, "prepare", *untrained[0].overrides], check=False).returncode
            if code and not self.stopped:
                raise NsaTrainError(f"the corpus could not be prepared (exit code {code}), see above")
        while self.running or (self.waiting and not self.stopped):
            for place, device in enumerate(places):
                if self.waiting and place not in self.running and self._may_start(self.waiting[0].command()[0]):
                    self.running[place] = self._start(self.waiting.pop(0), device)
            if not self.stopped and (time.monotonic() > self.end or not self.running):  # not: none fits any more
                self._stop()
            self._collect()
            time.sleep(POLL_S)
        if self.stopped:
            raise Interrupted("stopped, checkpoints written; the same command goes on")

    def _may_start(self, word: str) -> bool:
        """Whether there is time for what commonly takes so long."""
        expected = median(self.took[word]) if self.took[word] else 0.0
        return not self.stopped and time.monotonic() + expected < self.end

    def _start(self, job: Job, device: str | None) -> Running:
        place = {runtime.RUNS_A_DEVICE: str(max(self.share, self.told))}
        if device is not None:
            place["CUDA_VISIBLE_DEVICES"] = device
        words = job.command()
        print(f"{job.config.name}: {words[0]}" + (f" on GPU {device}" if device is not None else ""), flush=True)
        log = job.log.open("ab")
        process = subprocess.Popen([*PROGRAM, *words], stdout=log, stderr=log, env=os.environ | place)
        return Running(job, words[0], process, log, time.monotonic())

    def _collect(self) -> None:
        for place, (job, word, process, log, began) in list(self.running.items()):
            if process.poll() is not None:
                log.close()
                del self.running[place]
                said = f"held-out loss {job.summary['val_loss_last']}" if not process.returncode else f"see {job.log}"
                print(f"{job.config.name}: exit code {process.returncode}, {said}", flush=True)
                job.keep()
                if not process.returncode:
                    self.took[word].append(time.monotonic() - began)
                    if job.command():
                        self.waiting.insert(0, job)

    def _stop(self, *signalled: object) -> None:
        self.stopped = True
        for one in self.running.values():
            one.process.terminate()


def _devices() -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES is set to for each run in turn; [None] on a CPU."""
    import torch

    if runtime.device().type == "cpu":
        return [None]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return list(visible.split(",") if visible else map(str, range(torch.cuda.device_count())))


def sweep(queue: Queue, arms: list[str], lrs: list[float], overrides: list[str]) -> int:
    """Train each arm with each learning rate; keep the best by held-out loss, a diverged run counting as worst.

    When stopped, what is known of arms that are whole is kept, too.
    """
    jobs = {(arm, lr): Job.of(f"{arm}-lr{lr:g}", *overrides, f"attention={arm}", f"optim.lr={lr}")
            for arm in arms for lr in sorted(lrs)}  # fmt: skip
    stopped, rows = None, []
    try:
        queue.train([job for job in jobs.values() if not job.diverged])
    except Interrupted as stop:
        stopped = stop
        arms = [arm for arm in arms if all(job.trained or job.diverged for (of, _), job in jobs.items() if of == arm)]
    for arm in arms:
        losses = {lr: _final_loss(jobs[arm, lr]) for lr in sorted(lrs)}
        finite = {lr: loss for lr, loss in losses.items() if loss is not None}
        if not finite:
            raise NsaTrainError(f"{arm} diverged with every learning rate; try smaller ones in --lrs")
        best = min(finite, key=lambda lr: finite[lr])
        edge = best in (min(lrs), max(lrs))
        shown = ", ".join(f"{lr:g}: {'diverged' if loss is None else f'{loss:.4f}'}" for lr, loss in losses.items())
        rows.append(
            {"arm": arm, "lr": best, "at_edge": edge, "losses": {f"{lr:g}": loss for lr, loss in losses.items()},
             "set": [*map(results.without_folders, overrides)]}
        )  # fmt: skip
        print(f"{arm}: best learning rate {best:g} of {shown}" + ("; at the edge: extend --lrs" if edge else ""))
    config = next(iter(jobs.values())).config
    path = Path(config.runs_dir, f"{config.experiment}-lr.json")
    if rows:
        rows = results.with_earlier(path, rows, lambda row: row["arm"])
        print(results.write_result(path.stem, "sweep", rows, folder=path.parent))
    if stopped:
        raise stopped
    return 0


def _final_loss(job: Job) -> float | None:
    """Held-out loss of a finished run, None of one that diverged."""
    summary = job.summary
    if summary.get("status") != "done" and not job.diverged:
        raise NsaTrainError(f"{job.config.name} did not finish; see {job.log}")
    return summary["val_loss_last"] if summary["status"] == "done" else None


def run(queue: Queue, args: argparse.Namespace) -> int:
    """Train each arm with each seed, then compare."""
    rates = _rates(Rates.read(args.rates), args) if args.rates else {}
    common = [f"{key}={value}" for key in ("lengths", "samples") if (value := getattr(args, key))]
    if not args.eval and (given := [*common, *(f"words={words}" for words in args.words or ())]):
        raise NsaTrainError(
            f"{', '.join(given)}: how --eval asks, and it is not given; add --eval TASK or leave this out"
        )
    ways = [(*common, f"words={words}") for words in dict.fromkeys(args.words or [Options.words])]
    experiment, jobs = load_config(args.set).experiment, []
    for seed in dict.fromkeys(args.seeds):
        for arm in dict.fromkeys(args.arms):
            rate = [f"optim.lr={rates[arm]}"] if rates else []
            words = [*args.set, f"attention={arm}", f"seed={seed}", *rate]
            name = f"{arm}-seed{seed}"
            if args.start_from:
                words.append(f"init_from={args.start_from / f'{experiment}-{name}'}")
            jobs.append(Job.of(name, *words, tasks=args.eval, ways=ways, keep=args.keep))
    _check_sources(jobs)
    results.safe_name(args.name or experiment)  # and what else would be found wrong only after the training
    read_gates(args.gates, [job.config for job in jobs])
    if args.eval:
        options = Options.parse([f"task={','.join(args.eval)}", *common])
        for job in jobs:
            check_lengths(options, job.config)
    queue.train(jobs)
    words = [f"--{key}={getattr(args, key)}" for key in ("name", "out", "rates") if getattr(args, key)]
    words += [f"--gates={path}" for path in args.gates]
    return compare([*(str(job.path) for job in jobs), *words])


def _check_sources(jobs: list[Job]) -> None:
    """NsaTrainError with the runs that are to be gone on from and are not there; what is kept needs none."""
    needed = {str(job.config.init_from) for job in jobs if job.config.init_from and job.command()[:1] == ["train"]}
    if missing := [folder for folder in sorted(needed) if not Path(folder).is_dir()]:
        raise NsaTrainError("--start-from: there are no runs " + ", ".join(missing) + "; train them first")


def _rates(found: Rates, args: argparse.Namespace) -> dict[str, float]:
    """Of each arm; says whose an arm without a sweep takes."""
    rates = found.of(args.arms, args.set)
    for arm, lr in rates.items():
        if (swept := found.swept(arm)) != arm:
            print(f"{arm}: learning rate {lr:g} of {swept}, for want of a sweep of its own")
    return rates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (("sweep", "find each arm's learning rate"), ("run", "train arms and seeds, and compare")):
        command = commands.add_parser(name, help=about)
        command.add_argument("--arms", nargs="+", required=True, metavar="ARM", help="options of configs/attention")
        command.add_argument("--set", nargs="+", default=[], metavar="key=value", help="for all runs")
        about = "runs that a GPU (or this CPU) trains at once; under NVIDIA's MPS small models then use more of it"
        command.add_argument("--per-gpu", type=int, default=1, metavar="N", help=about)
        about = "stop after so long, as by SIGTERM; what would commonly take longer than is left is not begun"
        command.add_argument("--until", type=float, default=math.inf, metavar="SECONDS", help=about)
    swept, trained = commands.choices["sweep"], commands.choices["run"]
    swept.add_argument("--lrs", nargs="+", type=float, required=True, metavar="LR")
    trained.add_argument("--seeds", nargs="+", type=int, default=[0])
    trained.add_argument("--rates", type=Path, help="JSON of a sweep of this recipe; default: one optim.lr")
    about = "of runs <experiment>-<arm>-seed<N> to take initial weights from: a stage of its own, such as a long one"
    trained.add_argument("--start-from", type=Path, metavar="FOLDER", help=about)
    about = f"of `nsa-train eval`, for every run that it fits: {', '.join(TASKS)}"
    trained.add_argument("--eval", nargs="+", default=[], choices=TASKS, metavar="TASK", help=about)
    trained.add_argument("--lengths", metavar="N,N", help="of these tasks; what has all of them is not asked again")
    about = f"as of `nsa-train eval`, default {Options.samples}; what was asked with others is asked again"
    trained.add_argument("--samples", metavar="N", help=about)
    about = f"of the quizzes' facts, `train` into tasks of their own, as of `nsa-train eval`; default {Options.words}"
    trained.add_argument("--words", nargs="+", choices=[*WORDS], help=about)
    about = "of files that keep runs: those that it has are not trained, and those that end are kept there"
    trained.add_argument("--keep", type=Path, metavar="FOLDER", help=about)
    trained.add_argument("--name", help="of the report; default: the experiment's")
    about = "of `nsa-train compare gates`, printed in the report; may be repeated, each for other arms"
    trained.add_argument("--gates", action="append", default=[], type=Path, metavar="FILE", help=about)
    trained.add_argument("--out", type=Path, help="folder of the report")
    args = parser.parse_args()
    runtime.setup_console()
    try:
        if args.per_gpu < 1:
            raise NsaTrainError(f"--per-gpu {args.per_gpu} must be 1 or more")
        queue = Queue(args.until, args.per_gpu)
        return sweep(queue, args.arms, args.lrs, args.set) if args.command == "sweep" else run(queue, args)
    except NsaTrainError as error:
        print(f"error: {error}" if error.exit_code != 75 else str(error), file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
