"""Whether a run fits a GPU, and if not, the first change of its keys that makes it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

from nsa_train.config.schema import Config, LayerPart
from nsa_train.data.stages import at_stage, stages_of
from nsa_train.plan.memory import Memory, memory
from nsa_train.plan.speed import GPUS, Gpu, run_seconds

GIB = 2**30
CONTEXT_GIB = 2  # of CUDA, its libraries and what an allocator leaves unused
SMALLEST_CHUNK = 512  # tokens; fewer logits at once only cost time
RECOMPUTED: tuple[tuple[LayerPart, ...], ...] = (("mlp",), ("attention",), ("attention", "mlp"))


class Run(NamedTuple):
    """A configuration on so many GPUs of a kind, and the words that led to it."""

    config: Config
    ranks: int
    kind: str  # a key of `GPUS`
    words: tuple[str, ...] = ()

    def but(self, section: str, key: str, value: Any, word: str | None = None) -> Run:
        """With that value, and the word that gives it where there was another."""
        if getattr(getattr(self.config, section), key) == value:
            return self
        changed = replace(self.config, **{section: replace(getattr(self.config, section), **{key: value})})
        return self._replace(config=changed, words=(*self.words, word or f"{section}.{key}={value}"))


def need(config: Config, ranks: int) -> Memory:
    """Of a rank, in the stage with the longest rows."""
    longest = max(stages_of(config), key=lambda stage: stage.seq_len)
    return memory(at_stage(config, longest, ranks), ranks)


def room(gpu: Gpu) -> float:
    """Bytes that a run may use."""
    return (gpu.memory_gib - CONTEXT_GIB) * GIB


def largest_part(found: Memory) -> tuple[str, float]:
    """Name and bytes."""
    return max(found.counted.items(), key=lambda item: item[1])


def verdict(config: Config, kind: str, ranks: int) -> str:
    """Whether it fits; if not, what is largest, and the first change that fits."""
    gpu, found = GPUS[kind], need(config, ranks)
    free = f"{gpu.memory_gib:g} GiB less {CONTEXT_GIB} for CUDA"
    if found.total <= room(gpu):
        return f"fits {ranks} x {kind} ({free})"
    part, size = largest_part(found)
    change = first_that_fits(config, ranks, kind)
    way = "no key makes it fit: shorter rows or a smaller model"
    if change:
        way = f"{' '.join(change.words)} fits, with {need(change.config, change.ranks).total / GIB:,.1f} GiB"
    over = (found.total - room(gpu)) / GIB
    return f"{ranks} x {kind} ({free}) too small by {over:,.1f} GiB; largest: {part}, {size / GIB:,.1f} GiB. {way}"


def first_that_fits(config: Config, ranks: int, kind: str) -> Run | None:
    """The fewest of `CHANGES` that fit, of several the first in the order of `CHANGES`; None: no change."""
    for number in range(1, len(CHANGES) + 1):
        for changes in combinations(CHANGES, number):
            for run in _applied(changes, Run(config, ranks, kind)):
                if need(run.config, run.ranks).total <= room(GPUS[kind]):
                    return run
    return None


def _applied(changes: Sequence[Callable[[Run], Iterator[Run]]], run: Run) -> Iterator[Run]:
    """The run after all changes, with every choice that each has."""
    if not changes:
        yield run
        return
    for changed in changes[0](run):
        yield from _applied(changes[1:], changed)


def _fewer_rows(run: Run) -> Iterator[Run]:
    """The most that differ in a forward pass first."""
    trainer = run.config.trainer
    rows = trainer.batch_rows // run.ranks
    for micro_rows in range(min(trainer.micro_rows, rows) - 1, 0, -1):
        if rows % micro_rows == 0:
            yield run.but("trainer", "micro_rows", micro_rows)


def recomputation(run: Run) -> Iterator[Run]:
    """Of other parts than now, or of more; the choice that takes least time first."""
    on = run.but("trainer", "activation_checkpointing", True, "trainer.activation_checkpointing=true")
    choices = [
        on.but("trainer", "recomputed", parts, f"trainer.recomputed=[{','.join(parts)}]")
        for parts in RECOMPUTED
        if not set(parts) <= set(run.config.trainer.computed_again)
    ]
    yield from sorted(choices, key=lambda choice: run_seconds(choice.config, run.kind, run.ranks))


def _sharded_weights(run: Run) -> Iterator[Run]:
    if run.config.parallel.zero_stage < 3:
        yield run.but("parallel", "zero_stage", 3, "parallel=zero3")


def _more_gpus(run: Run) -> Iterator[Run]:
    ranks = 2 * run.ranks
    while not run.config.sharing_problems(ranks):
        yield run._replace(ranks=ranks, words=(*run.words, f"gpus={ranks}"))
        ranks *= 2


def _host_optimizer(run: Run) -> Iterator[Run]:
    if run.config.parallel.offload_optimizer == "none":
        yield run.but("parallel", "offload_optimizer", "cpu")


def _smaller_chunks(run: Run) -> Iterator[Run]:
    chunk = run.config.trainer.loss_chunk_tokens // 2
    while chunk >= SMALLEST_CHUNK:
        yield run.but("trainer", "loss_chunk_tokens", chunk)
        chunk //= 2


# In this order: what costs least to try, and changes least, first.
CHANGES = (_fewer_rows, recomputation, _sharded_weights, _more_gpus, _host_optimizer, _smaller_chunks)
