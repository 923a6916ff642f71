"""The report of `nsa-train plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nsa_train.config.schema import Config
from nsa_train.data.stages import at_stage, stages_of
from nsa_train.errors import ConfigError
from nsa_train.model.counts import meta_model, parameters_by_part
from nsa_train.plan.advice import GIB, need, verdict
from nsa_train.plan.flops import forward_flops, training_flops
from nsa_train.plan.speed import GPUS, predictable, run_seconds, step_seconds
from nsa_train.runtime import dtype_of

COUNTS = (1, 8, 64)  # of GPUs, where none are named


@dataclass(frozen=True)
class Machine:
    """gpu  kind, a key of `GPUS`;  gpus  how many, a column of the report each; empty: those of COUNTS that fit"""

    gpu: str = "h100"
    gpus: tuple[int, ...] = ()

    @staticmethod
    def parse(words: Sequence[str]) -> tuple[Machine, list[str]]:
        """The machine in `gpu=` and `gpus=`, and the other words, which are about the configuration."""
        machine, others = Machine(), []
        for word in words:
            key, _, value = word.partition("=")
            if key == "gpu":
                if value not in GPUS:
                    raise ConfigError(f"{word}: no such kind of GPU; use {' or '.join(GPUS)}")
                machine = replace(machine, gpu=value)
            elif key == "gpus":
                numbers = value.split(",")
                if not all(number.isdecimal() and int(number) > 0 for number in numbers):
                    raise ConfigError(f"{word}: gpus must be numbers from 1 on, like gpus=8 or gpus=8,64")
                machine = replace(machine, gpus=tuple(int(number) for number in numbers))
            else:
                others.append(word)
        return machine, others


def plan(config: Config, machine: Machine | None = None) -> str:
    """Parameters, FLOPs, speed and memory, a line each part, and what to change where a GPU is too small."""
    machine = machine or Machine()
    if config.trainer.dtype == "auto":  # on a GPU
        config = replace(config, trainer=replace(config.trainer, dtype="bf16"))
    counts = machine.gpus or tuple(n for n in COUNTS if not config.sharing_problems(n))
    if problems := [f"gpus={n}: {problem}" for n in counts for problem in config.sharing_problems(n)]:
        raise ConfigError("\n".join(problems))
    parts = [_parameters(config), _flops(config), _speed(config, machine.gpu, counts)]
    return "\n\n".join([*parts, _memory(config, machine.gpu, counts)])


def _parameters(config: Config) -> str:
    parts = parameters_by_part(meta_model(config))
    total, active = (sum(column) for column in zip(*parts.values(), strict=True))
    lines = [f"{config.name}: {config.model.layers} layers, width {config.model.width}, {config.arm} attention", ""]
    lines += [f"{'parameters':22}{'total':>18}{'active per token':>20}"]
    lines += [f"  {part:20}{n:>18,}{used:>20,}" for part, (n, used) in parts.items()]
    lines += [f"  {'all':20}{total:>18,}{active:>20,}   (embedding and head are not active)"]
    return "\n".join(lines)


def _flops(config: Config) -> str:
    trainer, flops = config.trainer, forward_flops(config)
    forward, training = sum(flops.values()), training_flops(config)
    lines = [f"forward FLOPs per token in one document of {trainer.seq_len} tokens"]
    lines += [f"  {part:20}{n / 1e6:>14,.2f} M{n / forward:>8.1%}" for part, n in flops.items()]
    lines += [f"  {'all':20}{forward / 1e6:>14,.2f} M"]
    tokens = trainer.batch_rows * trainer.seq_len
    lines += [
        f"  training takes {training / forward:.2f} times that: {training * tokens / 1e12:,.3f} TFLOP a step of "
        f"{tokens:,} tokens, {training * tokens * trainer.steps / 1e15:,.4f} PFLOP for {trainer.steps} steps"
    ]
    return "\n".join(lines)


def _speed(config: Config, kind: str, counts: Sequence[int]) -> str:
    if not predictable(config):
        return "no speed: it is known for bf16 with the optimizer's state on the GPU only"
    tokens = config.trainer.batch_rows * config.trainer.seq_len
    lines = []
    for stage in stages_of(config):
        by_count = [step_seconds(at_stage(config, stage, ranks), kind, ranks) for ranks in counts]
        totals = [sum(seconds.values()) for seconds in by_count]
        lines.append(f"ms of a step of {tokens:,} tokens in rows of {stage.seq_len}, each one document, on {kind}")
        lines.append(_row("GPUs", [str(ranks) for ranks in counts]))
        parts = dict.fromkeys(part for seconds in by_count for part in seconds)
        lines += [_row(part, [f"{1e3 * seconds.get(part, 0.0):,.1f}" for seconds in by_count]) for part in parts]
        lines.append(_row("all", [f"{1e3 * total:,.1f}" for total in totals]))
        lines.append(_row("tokens/s", [f"{tokens / total:,.0f}" for total in totals]))
    run = [_duration(run_seconds(config, kind, ranks)) for ranks in counts]
    lines.append(_row(f"{config.trainer.steps * tokens / 1e9:,.3f} B tokens take", run))
    return "\n".join([*lines, "  (measured shares of the peak; no wait for the host)"])


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:,.2f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"


def _row(name: str, values: Sequence[str]) -> str:
    return f"  {name:30}" + "".join(f"{value:>14}" for value in values)


def _memory(config: Config, kind: str, counts: Sequence[int]) -> str:
    trainer, dtype = config.trainer, dtype_of(config.trainer.dtype)
    again = ", ".join(trainer.computed_again)
    by_count = [need(config, ranks) for ranks in counts]
    lines = [
        f"GiB per rank, {str(dtype)[6:]}, ZeRO {config.parallel.zero_stage}, {trainer.micro_rows} rows of "
        f"{trainer.seq_len} tokens in a forward pass at most" + (again and f", recomputed: {again}"),
        _row("GPUs", [str(ranks) for ranks in counts]),
    ]
    for group in ("states", "kept", "passing"):
        for part in getattr(by_count[0], group):
            note = " (passing)" if group == "passing" else ""
            lines.append(_row(part + note, [f"{getattr(one, group)[part] / GIB:,.2f}" for one in by_count]))
    lines.append(_row("all, the largest passing one", [f"{one.total / GIB:,.2f}" for one in by_count]))
    return "\n".join([*lines, *(f"  {verdict(config, kind, ranks)}" for ranks in counts)])
