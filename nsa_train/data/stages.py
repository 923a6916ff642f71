"""The stages of a run: when its rows grow longer and its mixture changes. Tokens per step stay the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nsa_train.config.schema import Config


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
