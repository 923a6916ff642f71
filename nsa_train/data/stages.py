"""The stages of a run: when its rows grow longer and its mixture changes. Tokens per step stay the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from nsa_train.config.schema import Config, StagesConfig, TrainerConfig


@dataclass(frozen=True)
class Stage:
    """Steps first_step, first_step + 1, ... until the next stage begins."""

    name: str
    first_step: int
    seq_len: int  # tokens in a row
    batch_rows: int  # rows in a step, over all ranks
    mixture: Mapping[str, float]  # token weights of sources; empty: as the corpus has them
    rope_factor: float  # YaRN: so many times longer than the model's positions were trained


def stages_of(config: Config) -> tuple[Stage, ...]:
    """The stages of a checked configuration; without any, one of `trainer.seq_len`. A stage begins with a step."""
    trainer, step_tokens = config.trainer, config.trainer.seq_len * config.trainer.batch_rows
    if not config.stages.parts:
        return (Stage("all", 0, trainer.seq_len, trainer.batch_rows, config.data.mixture, config.model.rope_factor),)
    found, tokens = [], 0
    for name, part in config.stages.parts.items():
        mixture = part.mixture or config.data.mixture
        first = -(-tokens // step_tokens)
        found.append(Stage(name, first, part.seq_len, step_tokens // part.seq_len, mixture, part.rope_factor))
        tokens += part.tokens or 0
    return tuple(found)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return max(size for size in range(1, min(number, limit) + 1) if number % size == 0)


def micro_batches_of(stages: Sequence[Stage], trainer: TrainerConfig, world: int) -> int:
    """Micro-batches of a rank in a step: as many in each stage, so every forward pass has as many tokens.

    Those of the longest rows decide; rows of other stages divide them.
    """
    longest = max(stages, key=lambda stage: stage.seq_len)
    rows = longest.batch_rows // world
    return rows // largest_divisor(rows, max(1, trainer.micro_rows * trainer.seq_len // longest.seq_len))


def at_stage(config: Config, stage: Stage, world: int) -> Config:
    """A run that has this stage only, with the rows that a forward pass of one of `world` ranks really has."""
    micro_rows = stage.batch_rows // (world * micro_batches_of(stages_of(config), config.trainer, world))
    trainer = replace(config.trainer, seq_len=stage.seq_len, batch_rows=stage.batch_rows, micro_rows=micro_rows)
    return replace(config, trainer=trainer, stages=StagesConfig(parts={}))
