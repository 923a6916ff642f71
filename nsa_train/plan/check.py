"""What a launch of a training run says of its plan: at its start where memory is too small, later what is measured.

Of GPUs of a known kind; the plan has no numbers of others.
"""

from __future__ import annotations

import statistics

from nsa_train import runtime
from nsa_train.config.schema import Config
from nsa_train.data.stages import Stage, at_stage
from nsa_train.errors import ConfigError
from nsa_train.plan.advice import GIB, need, room, verdict
from nsa_train.plan.memory import memory
from nsa_train.plan.speed import GPUS, kind_of, predictable, step_seconds

SURE = ("weights", "gradients", "optimizer")  # states that every step has at once
STEPS = 20  # of a launch, after which it is said
STARTING = 10  # of them, first ones, with compilation and warm-up: they do not count


def check_memory(config: Config, ranks: int, device_name: str) -> None:
    """Warn where the plan needs more memory than `ranks` GPUs called `device_name` have, with what would fit.

    Raises ConfigError only where it is certain: where states alone are more than a whole GPU.
    """
    kind = kind_of(device_name)
    if not kind:
        return
    found, gpu = need(config, ranks), GPUS[kind]
    states = sum(found.states[part] for part in SURE) / GIB
    if states > gpu.memory_gib:
        raise ConfigError(
            f"weights, gradients and optimizer take {states:,.1f} GiB of each GPU, which is more than it has: "
            f"{verdict(config, kind, ranks)}"
        )
    if found.total > room(gpu):
        parts = ", ".join(f"{part} {size / GIB:,.1f}" for part, size in found.counted.items() if size)
        runtime.log.warning(
            f"warning: memory may run out. GiB of a GPU, by `nsa-train plan gpu={kind} gpus={ranks}`: {parts}, "
            f"all {found.total / GIB:,.1f}. {verdict(config, kind, ranks)}"
        )


class PlanCheck:
    """Of a launch that begins in `stage`, on `ranks` GPUs called `device_name`; silent where their kind is unknown."""

    def __init__(self, config: Config, stage: Stage, ranks: int, device_name: str) -> None:
        self._seconds: list[float] = []
        self._tokens = stage.batch_rows * stage.seq_len
        self._planned: tuple[float | None, float] | None = None  # seconds of a step, GiB
        if kind := kind_of(device_name):
            alone = at_stage(config, stage, ranks)
            seconds = sum(step_seconds(alone, kind, ranks).values()) if predictable(config) else None
            self._planned = seconds, memory(alone, ranks).total / GIB

    def note(self, step: int, seconds: float) -> str | None:
        """After each step, with its time: the line to say, or None."""
        self._seconds.append(seconds)
        if not self._planned or len(self._seconds) != STEPS:
            return None
        planned_s, planned_gib = self._planned
        speed = f"{self._tokens / statistics.median(self._seconds[STARTING:]):,.0f} tok/s"
        if planned_s:
            speed += f", planned {self._tokens / planned_s:,.0f}"
        return f"step {step}: {speed}; peak {runtime.peak_memory_gib():.1f} GiB, planned {planned_gib:.1f}"
