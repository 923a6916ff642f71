"""The report of `nsa-train plan`."""

from __future__ import annotations

from nsa_train.config.schema import Config
from nsa_train.model.counts import meta_model, parameters_by_part
from nsa_train.plan.flops import forward_flops, training_flops
from nsa_train.plan.memory import Memory, memory
from nsa_train.runtime import dtype_of

GIB = 2**30
RANKS = (1, 8, 64)
GPU_GIB = 79  # that a program finds free on an 80 GB GPU
CONTEXT_GIB = 2  # of CUDA, its libraries and what an allocator leaves unused


def plan(config: Config) -> str:
    """Parameters, FLOPs and memory, a line each part, and what to change where a GPU of 80 GB is too small."""
    return "\n\n".join([_parameters(config), _flops(config), _memory(config)])


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


def _memory(config: Config) -> str:
    trainer, dtype = config.trainer, dtype_of(config.trainer.dtype)
    by_ranks = [memory(config, ranks) for ranks in RANKS]
    lines = [
        f"GiB per rank on a GPU, {str(dtype)[6:]}, ZeRO {config.parallel.zero_stage}, {trainer.micro_rows} rows of "
        f"{trainer.seq_len} tokens in a forward pass" + ", recomputed" * trainer.activation_checkpointing,
        f"  {'ranks':30}" + "".join(f"{ranks:>12}" for ranks in RANKS),
    ]
    for group in ("states", "kept", "passing"):
        for part in getattr(by_ranks[0], group):
            values = [getattr(one, group)[part] / GIB for one in by_ranks]
            note = " (passing)" if group == "passing" else ""
            lines.append(f"  {part + note:30}" + "".join(f"{value:>12,.2f}" for value in values))
    lines.append(f"  {'all, the largest passing one':30}" + "".join(f"{one.total / GIB:>12,.2f}" for one in by_ranks))
    return "\n".join([*lines, *_advice(config, by_ranks)])


def _advice(config: Config, by_ranks: list[Memory]) -> list[str]:
    """What is too large for a GPU of 80 GB, and which key makes it smaller."""
    room = (GPU_GIB - CONTEXT_GIB) * GIB
    found = []
    for ranks, one in zip(RANKS, by_ranks, strict=True):
        if one.total <= room:
            continue
        states, kept, passing = sum(one.states.values()), sum(one.kept.values()), one.passing
        if states > room:
            stage = "parallel=zero3" if config.parallel.zero_stage < 3 else "parallel.offload_optimizer=cpu"
            key = f"weights, gradients and optimizer alone take {states / GIB:,.0f} GiB: more ranks, or {stage}"
        elif kept > max(passing.values()) and not config.trainer.activation_checkpointing:
            less = "fewer trainer.micro_rows, or trainer.activation_checkpointing=true"
            key = f"activations take {kept / GIB:,.0f} GiB: {less}"
        elif max(passing, key=lambda part: passing[part]) == "head backward":
            key = f"the head takes {passing['head backward'] / GIB:,.0f} GiB: a smaller trainer.loss_chunk_tokens"
        else:
            key = "fewer trainer.micro_rows, or a shorter trainer.seq_len"
        found.append(f"  {ranks} x 80 GB are too small by {(one.total - room) / GIB:,.0f} GiB: {key}")
    return found
