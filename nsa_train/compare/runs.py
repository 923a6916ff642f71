"""Finished runs as a comparison reads them, and whether they may stand side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nsa_train import runtime
from nsa_train.bench.trained import BLOCKS_FILE
from nsa_train.compare import kept
from nsa_train.config import schema
from nsa_train.data.stages import stages_of
from nsa_train.errors import ConfigError, NsaTrainError, RunFolderError
from nsa_train.plan.flops import training_flops
from nsa_train.train.answers import read_answers
from nsa_train.train.folder import FREE_KEYS, differing, read_config
from nsa_train.train.heldout import HELDOUT, HeldOut
from nsa_train.train.metrics import METRICS, read_metrics

BASELINE, NSA = "full", "nsa"
MAPS, BLOCKS = Path("eval", "maps.png"), Path("eval", BLOCKS_FILE)  # in the folder of a run
# In which arms of a comparison may differ, beside the learning rate that each one tunes.
ARM_KEYS = (
    "attention.branches", "attention.gate", "attention.phi", "attention.shared_kv", "attention.selection",
    "moe.expert_width",
)  # fmt: skip
# What a comparison takes from each run, beside what older ones may lack.
FACTS = {
    "manifest": ("corpus", "rows_fingerprint", "initial_weights_sha256", "device", "world_size", "commit", "versions"),
    "corpus": ("name", "hash", "epochs", "share_past"),
    "summary": ("steps", "tokens", "params_total", "params_active", "unigram_entropy", "skipped_steps"),
}
FIGURES = {  # of rows of metrics.jsonl, by `split`
    "train": ("tokens", "tokens_per_s", "mem_gib", "load_peak"),
    "val": ("step", "tokens", "loss", "by_position", "layers"),
}


@dataclass(frozen=True)
class Run:
    """One arm with one seed: what a finished run folder says, checkpoints aside.

    path         its folder, or the file that keeps it
    rows         of metrics.jsonl
    evaluations  what `nsa-train eval` has found out about the run: a `summary` (of blocks: a `selection`) of each task
                 and length, and its parts
    """

    path: Path
    config: schema.Config
    manifest: dict[str, Any]
    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    heldout: HeldOut
    evaluations: list[dict[str, Any]]

    @staticmethod
    def read(path: Path) -> Run:
        """Raises RunFolderError where there is no run, an unfinished one, or one of which something is lost."""
        run = Run(path, **kept.load(path)) if path.is_file() else Run._of_folder(path)
        if lack := run._lack():
            raise RunFolderError(f"{path}: {lack}; copy it from where it is whole, or train again")
        return run

    @staticmethod
    def _of_folder(folder: Path) -> Run:
        summary = _json(folder / "summary.json")
        if summary.get("status") != "done":
            steps = f", {summary['steps']} steps taken" if "steps" in summary else ""
            raise RunFolderError(f"{folder}: the run is not finished ({summary.get('status', 'running')}{steps})")
        config, manifest, rows = read_config(folder), _json(folder / "manifest.json"), read_metrics(folder / METRICS)
        evaluations = [row for path in sorted((folder / "eval").glob("*.json")) for row in read_answers(path)]
        return Run(folder, config, manifest, summary, rows, HeldOut.load(folder / HELDOUT), evaluations)

    def _lack(self) -> str | None:
        """What is missing of what a comparison reads, if anything is."""
        for name, keys in FACTS.items():
            if missing := _missing(getattr(self, name), keys):
                return f"its {name} says nothing of {', '.join(missing)}"
        for row in self.rows if isinstance(self.rows, list) else [None]:
            if missing := _missing(row, ("split",)) or _missing(row, FIGURES.get(str(row["split"]), ())):
                return f"its metrics have a row without {', '.join(missing)}"
        last = (self.of("val") or [{}])[-1]
        if not self.of("train") or last.get("step") != self.summary["steps"] or last.get("loss") is None:
            return f"its metrics lack training, or the held-out loss after the last step, {self.summary['steps']}"
        return None

    def keep(self, folder: Path) -> tuple[Path, bool]:
        """The file in `folder` that keeps the run, and whether it had to be written. Raises as `kept.save`.

        Its maps are copied beside it; what of its evaluations is too large to be kept is said when it is written.
        """
        path = folder / f"{self.config.name}{kept.SUFFIX}"
        written = kept.save(path, {key: getattr(self, key) for key in kept.PARTS})
        left = [self.path / BLOCKS] if (self.path / BLOCKS).is_file() else []
        if self.maps.is_file() and not kept.save_maps(path, self.maps):
            left.append(self.maps)
        if written and left:
            sizes = ", ".join(f"{file} ({file.stat().st_size:,} bytes)" for file in left)
            runtime.log.info("%s: not kept: %s; copy it where the folder is not to stay", path, sizes)
        return path, written

    @property
    def maps(self) -> Path:
        """Where the figure of its attention maps lies, if it has one."""
        return kept.maps_of(self.path) if self.path.is_file() else self.path / MAPS

    @property
    def arm(self) -> str:
        return self.config.arm

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def corpus(self) -> dict[str, Any]:
        return self.manifest["corpus"]

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """What is known of the run and of those that it goes on from (`init_from`), the first one last."""
        found = [self.manifest]
        while origin := found[-1].get("origin"):
            found.append(origin)
        return found

    @property
    def rows_read(self) -> list[str | None]:
        """Fingerprints of the rows of the lineage's runs."""
        return [one.get("rows_fingerprint") for one in self.lineage]

    @property
    def steps_before(self) -> list[int | None]:
        """Of the runs that this one goes on from, the first one first; an export alone does not know its steps."""
        return [one.get("step") for one in reversed(self.lineage[1:])]

    @property
    def drawn_weights(self) -> dict[str, str]:
        """sha256 by name and shape of the weights that the first run of the lineage drew.

        Of weights that came from an export without its run, which knows nothing of it, the weights of the export.
        """
        return [one for one in self.lineage if "initial_weights_sha256" in one][-1]["initial_weights_sha256"]

    @property
    def loss(self) -> float:
        """Held-out, at the end: nats per token."""
        loss, labels = self.heldout.position.sum((0, 1))
        return float(loss / labels)

    def of(self, split: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["split"] == split]

    @cached_property
    def curve(self) -> list[tuple[int, float]]:
        """(tokens, held-out loss) of each validation."""
        return [(row["tokens"], row["loss"]) for row in self.of("val") if row["loss"] is not None]

    @property
    def in_graphs(self) -> bool:
        """Whether training passes were replayed as CUDA graphs.

        Older runs do not tell: by their configuration, of which `auto` left out full attention then.
        """
        auto, full = self.config.trainer.cuda_graphs == "auto", self.config.attention.branches == ("full",)
        then = self.config.in_graphs and not (auto and full) and self.manifest["device"] != "CPU"
        return self.manifest.get("cuda_graphs", then)

    @property
    def runs_a_device(self) -> int:
        """How many runs shared the device, this one included: where it was not alone its seconds say nothing."""
        return self.manifest.get("runs_a_device", 1)

    @property
    def tokens_per_s(self) -> float:
        """Median over the logged steps."""
        return float(np.median([row["tokens_per_s"] for row in self.of("train")]))

    @cached_property
    def flops_per_token(self) -> list[float]:
        """Executed FLOPs of a trained token in each stage, as if every row were one document."""
        config = self.config
        lengths = [stage.seq_len for stage in stages_of(config)]
        return [training_flops(replace(config, trainer=replace(config.trainer, seq_len=n))) for n in lengths]

    def flops(self, tokens: int) -> float:
        """Executed in training on the first `tokens`."""
        step_tokens = self.config.trainer.seq_len * self.config.trainer.batch_rows
        begins = [stage.first_step * step_tokens for stage in stages_of(self.config)]
        spans = [max(0, min(tokens, end) - begin) for begin, end in pairwise([*begins, tokens])]
        return sum(cost * span for cost, span in zip(self.flops_per_token, spans, strict=True))

    def seconds(self, tokens: int) -> float:
        """Of training the first `tokens`: validation, checkpoints and start-up aside.

        The first logged speed holds start-up and compilation; the median stands for it.
        """
        at, spent = [0.0], [0.0]
        for number, row in enumerate(self.of("train")):
            speed = row["tokens_per_s"] if number else self.tokens_per_s
            spent.append(spent[-1] + (row["tokens"] - at[-1]) / speed)
            at.append(row["tokens"])
        return float(np.interp(tokens, at, spent))


def _missing(found: Any, keys: Sequence[str]) -> list[str]:
    """Which keys plain data does not have: all of them where it is no object."""
    return [key for key in keys if not isinstance(found, dict) or key not in found]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read ({error}); name folders of finished runs") from error
    if not isinstance(found, dict):
        raise RunFolderError(f"{path}: holds no object; name folders of finished runs")
    return found


@dataclass(frozen=True)
class Arms:
    """Runs that may be compared, by arm: the baseline first, seeds ascending."""

    runs: dict[str, tuple[Run, ...]]

    @staticmethod
    def read(paths: Sequence[Path]) -> Arms:
        """Raises NsaTrainError with everything that keeps these runs from being compared."""
        found, problems = [], []
        for path in paths:
            try:
                found.append(Run.read(path))
            except (RunFolderError, ConfigError) as error:
                problems.append(str(error))
        if not problems:
            problems = [line for check in CHECKS for line in check(found)]
        if problems:
            raise NsaTrainError("these runs cannot be compared:\n" + "\n".join(f"  {line}" for line in problems))
        arms = dict.fromkeys(run.arm for run in found)
        first = _baseline(found)
        ordered = [first, *(arm for arm in arms if arm != first)]
        by_seed = sorted(found, key=lambda run: run.seed)
        return Arms({arm: tuple(run for run in by_seed if run.arm == arm) for arm in ordered})

    @property
    def baseline(self) -> str:
        return next(iter(self.runs))

    @property
    def all(self) -> list[Run]:
        return [run for runs in self.runs.values() for run in runs]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(arm, its baseline): every arm beside the baseline, and nsa beside every other arm."""
        others = [arm for arm in self.runs if arm != self.baseline]
        beside = [(NSA, arm) for arm in others if arm != NSA] if NSA in others else []
        return [(arm, self.baseline) for arm in others] + beside

    def by_seed(self, arm: str) -> dict[int, Run]:
        return {run.seed: run for run in self.runs[arm]}


def _baseline(runs: Sequence[Run]) -> str:
    """`full`, or else the arm that was named first."""
    return BASELINE if any(run.arm == BASELINE for run in runs) else runs[0].arm


# Why runs may not be compared: each check names what breaks it --------------------------------------------------------


def _one_corpus(runs: Sequence[Run]) -> Iterator[str]:
    first = runs[0]
    for run in runs[1:]:
        ours, theirs = run.corpus["hash"], first.corpus["hash"]
        if ours != theirs:
            yield f"{run.path}: corpus {ours[:12]}, but {first.path} read {theirs[:12]}"


def _one_recipe(runs: Sequence[Run]) -> Iterator[str]:
    """Configurations differ in the arm, its learning rate and the seed; those of one arm in the seed only.

    How a step is split into micro-batches is free: it changes rounding only. Corpora and origins have checks of their
    own.
    """
    free = (*FREE_KEYS, *kept.SAME_RESULT, "name", "seed", "init_from")
    recipes = {id(run): kept.recipe(run.config) for run in runs}
    for number, run in enumerate(runs):
        sibling = next(other for other in runs if other.arm == run.arm)
        if run is not sibling:
            for key, (a, b) in differing(recipes[id(run)], recipes[id(sibling)], free).items():
                yield f"{run.path}: {key}={a!r}, but {sibling.path} of the same arm has {b!r}"
        elif number:
            other_arm = (*free, *ARM_KEYS, "arm", "optim.lr")
            for key, (a, b) in differing(recipes[id(run)], recipes[id(runs[0])], other_arm).items():
                yield f"{run.path}: {key}={a!r}, but {runs[0].path} has {b!r}, and that is no key of an arm"


def _as_far(runs: Sequence[Run]) -> Iterator[str]:
    """Runs of all seeds start afresh, or go on from runs of as many steps."""
    first = runs[0]
    for run in runs[1:]:
        if run.steps_before != first.steps_before:
            yield f"{run.path}: {_began(run)}, but {first.path} {_began(first)}"


def _began(run: Run) -> str:
    return f"goes on from {run.steps_before} steps" if run.steps_before else "starts afresh"


def _paired_seeds(runs: Sequence[Run]) -> Iterator[str]:
    """Each arm has a seed once, and none that its baseline lacks."""
    seen: dict[tuple[str, int], Run] = {}
    for run in runs:
        if (run.arm, run.seed) in seen:
            yield f"{run.path}: {run.arm} with seed {run.seed} is already there: {seen[run.arm, run.seed].path}"
        seen[run.arm, run.seed] = run
    baseline = _baseline(runs)
    yield from (
        f"{run.path}: {run.arm} with seed {run.seed} has no partner, {baseline} with that seed"
        for run in runs
        if (baseline, run.seed) not in seen
    )
    if all(run.arm == baseline for run in runs):
        yield f"all runs are of the arm {baseline}; name runs of two arms or more"


def _same_rows_and_weights(runs: Sequence[Run]) -> Iterator[str]:
    """Runs of a seed read the same rows, in training and held out, and start alike where they have a parameter.

    Runs that go on from others (`init_from`) are alike when those are.
    """
    first: dict[int, Run] = {}
    sampled: dict[tuple[Any, ...], tuple[str, Run]] = {}  # of as many steps of one plan; older runs have none
    weights: dict[int, dict[str, str]] = {}  # of a seed, by name and shape, whichever arm had them first
    for run in runs:
        other, known = first.setdefault(run.seed, run), weights.setdefault(run.seed, {})
        if run.rows_read != other.rows_read:
            yield f"{run.path}: other rows in another order than {other.path}, though both have seed {run.seed}"
        taken = [run.config.trainer.steps, *reversed(run.steps_before)]
        for place, (one, steps) in enumerate(zip(run.lineage, taken, strict=True)):
            if sample := one.get("rows_sample_sha256"):
                expected, by = sampled.setdefault((place, one.get("rows_fingerprint"), steps), (sample, run))
                if sample != expected:
                    yield f"{run.path}: other tokens in its rows than {by.path}: their commits make rows in other ways"
        ours = run.drawn_weights
        unlike = [name for name in ours.keys() & known.keys() if ours[name] != known[name]]
        if unlike or (known and not ours.keys() & known.keys()):
            what = f"{len(unlike)} parameters such as {min(unlike)}" if unlike else "no parameter in common"
            yield f"{run.path}: starts from other weights than runs of the same seed such as {other.path}: {what}"
        weights[run.seed] = ours | known
        a, b = run.heldout, other.heldout
        if not (np.array_equal(a.document, b.document) and np.array_equal(a.position[..., 1], b.position[..., 1])):
            yield f"{run.path}: its held-out losses are of other rows than those of {other.path}"


CHECKS: tuple[Callable[[Sequence[Run]], Iterator[str]], ...] = (
    _one_corpus, _one_recipe, _as_far, _paired_seeds, _same_rows_and_weights,
)  # fmt: skip
