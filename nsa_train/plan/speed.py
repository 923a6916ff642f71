"""How long a training step takes on a kind of GPU, by part, before anything starts.

A part's floor is the time of its work at the GPU's peak: FLOPs over peak FLOP/s or, where it does little but move data,
bytes over bandwidth. Its time is its floor over the measured share of the peak that it reaches. Parts are those of
`train.profile`. Every row counts as one document, as in `flops`. Not in it: the GPU waiting for the host or for data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nsa_train.config.schema import Config
from nsa_train.data.stages import at_stage, stages_of
from nsa_train.model.counts import meta_model, parameters_by_part
from nsa_train.plan.flops import forward_flops
from nsa_train.plan.memory import without_buckets
from nsa_train.runtime import dtype_of

GPUS_OF_A_HOST = 8


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, by its data sheet; memory as CUDA reports it."""

    name: str  # that CUDA gives it
    flops: float  # dense bf16, a second
    bandwidth: float  # bytes a second to its memory
    link: float  # ... to another GPU of its host, one way
    network: float  # ... out of its host: 8 x 400 Gb/s, over which the rings of a collective spread
    memory_gib: float


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 989e12, 3.35e12, 450e9, 400e9, 79.1),
    "h200": Gpu("NVIDIA H200", 989e12, 4.8e12, 450e9, 400e9, 139.8),
}

Shares = Mapping[str, Mapping[int, float]]  # part -> size (`size_of`) -> share of the peak

# By `python scripts/fit_speed.py docs/results/training_<gpu>.json docs/results/attention_h100.json`, whose output
# stands here: GPU time by `profile=trace`. Sizes 384 and 64 are preset r1, 1536 and an H200's 192 m, 2560 and an
# H100's 192 the paper's model.
# `other` of an H200 is left out: its rows are from before one rank added gradients at once.
H200: Shares = {
    "attention": {384: 0.372, 1536: 0.633},
    "attention, cmp": {64: 0.139, 192: 0.193},
    "attention, gates": {64: 0.849, 192: 0.848},
    "attention, selection": {64: 0.079, 192: 0.207},
    "attention, slc": {64: 0.214, 192: 0.306},
    "attention, win": {64: 0.222, 192: 0.273},
    "communication": {384: 0.181},
    "dense MLP": {384: 0.513, 1536: 0.710},
    "experts": {384: 0.173, 1536: 0.495},
    "head": {384: 0.482, 1536: 0.735},
    "norms": {384: 0.545, 1536: 0.529},
    "optimizer": {384: 0.175, 1536: 0.319},
    "router": {384: 0.275, 1536: 0.235},
}
H100: Shares = {
    "attention": {384: 0.324, 1536: 0.596, 2560: 0.707},
    "attention, cmp": {64: 0.137, 192: 0.195},
    "attention, full": {64: 0.383, 128: 0.498, 192: 0.444},
    "attention, gates": {64: 0.863, 192: 0.883},
    "attention, selection": {64: 0.077, 192: 0.177},
    "attention, slc": {64: 0.203, 192: 0.266},
    "attention, win": {64: 0.221, 192: 0.279},
    "dense MLP": {384: 0.443, 1536: 0.662, 2560: 0.792},
    "experts": {384: 0.178, 1536: 0.470, 2560: 0.570},
    "head": {384: 0.423, 1536: 0.660, 2560: 0.738},
    "norms": {384: 0.618, 1536: 0.614, 2560: 0.555},
    "optimizer": {384: 0.217, 1536: 0.329, 2560: 0.379},
    "other": {384: 0.078, 1536: 0.509, 2560: 0.619},
    "router": {384: 0.319, 1536: 0.304, 2560: 0.203},
}


def _filled(own: Shares, others: Shares) -> Shares:
    """With what the other kind of GPU tells of parts and sizes that were not measured on this one."""
    return {part: {**others.get(part, {}), **own.get(part, {})} for part in {**others, **own}}


SHARES: dict[str, Shares] = {"h100": _filled(H100, H200), "h200": _filled(H200, H100)}

ATTENTION = "attention"
PART_OF = {  # of `flops`, where the profile has other names
    "queries and output": ATTENTION, "keys and values": ATTENTION, "gates": ATTENTION, "compression": ATTENTION,
    "shared experts": "experts", "routed experts": "experts", "importance": "attention, selection",
}  # fmt: skip
MLP = ("dense MLP", "experts")


def kind_of(device_name: str) -> str | None:
    """Key of `GPUS` for a name that CUDA gives."""
    return next((kind for kind, gpu in GPUS.items() if gpu.name == device_name), None)


def size_of(part: str, config: Config) -> int:
    """What a part's share depends on: the width of a head, or of the model."""
    return config.model.key_dim if part.startswith(f"{ATTENTION}, ") else config.model.width


def floors(config: Config, gpu: Gpu, ranks: int) -> dict[str, float]:
    """Seconds that a rank's work of a step takes at the GPU's peak, by part; of a run with one stage."""
    seconds = {part: flops / gpu.flops for part, flops in step_flops(config, ranks).items()}
    seconds |= {part: bytes_ / gpu.bandwidth for part, bytes_ in step_bytes(config, ranks).items()}
    if ranks > 1:
        link = gpu.link if ranks <= GPUS_OF_A_HOST else gpu.network
        seconds["communication"] = sent_bytes(config, ranks) / link
    return seconds


def step_flops(config: Config, ranks: int) -> dict[str, float]:
    """FLOPs that a rank executes in a step, in the parts that compute: backward is twice forward."""
    tokens = _tokens(config, ranks)
    found: dict[str, float] = {}
    again = config.trainer.computed_again
    for name, forward in forward_flops(config).items():
        part = PART_OF.get(name, name)
        times = 1 if name == "importance" else 3
        times += part == "head"  # the loss always computes logits again
        times += ("attention" in again and part.startswith(ATTENTION)) or ("mlp" in again and part in MLP)
        found[part] = found.get(part, 0.0) + times * forward * tokens
    found.pop("router", None)  # little but data: in `step_bytes`
    return found


def step_bytes(config: Config, ranks: int) -> dict[str, float]:
    """Bytes that a rank reads and writes in a step, in the parts that do little else."""
    m, a, tokens = config.model, config.attention, _tokens(config, ranks)
    width, again = dtype_of(config.trainer.dtype).itemsize, "attention" in config.trainer.computed_again
    parameters, micro_batches = _parameters(config), config.trainer.batch_rows / ranks / config.trainer.micro_rows
    found = {
        # forward reads and writes a row, backward reads two and writes one, those before attention perhaps once more;
        # those before an MLP also add: two and two, three and one
        "norms": tokens * m.width * width * (5 * (m.layers + 1) + 8 * m.layers + 2 * again * m.layers),
        # input twice and its gradient; logits, their gradient and its halves, each written and read
        "router": tokens * (m.layers - m.dense_layers) * (3 * m.width * width + 6 * config.moe.experts * 4),
        # gradient, and fp32 weights and two moments read and written; weights
        "optimizer": parameters / ranks * (4 + 6 * 4 + width),
        # each micro-batch adds its gradients to a sum in fp32
        "other": micro_batches * parameters * _summed_bytes(config, ranks),
    }
    if len(a.branches) > 1:  # forward reads the branches' outputs and writes one, backward reads four
        found["attention, gates"] = tokens * m.layers * m.heads * m.value_dim * width * (8 + 4 * again)
    return found


def _summed_bytes(config: Config, ranks: int) -> float:
    """Read and written of a gradient's element on its way to the sum of its rank, by DeepSpeed's ZeRO 2 or at once."""
    width = dtype_of(config.trainer.dtype).itemsize
    if without_buckets(config, ranks):
        return width + 2 * 4
    sent = 3 * 2 * width + 2 * (width + 4)  # into the bucket, divided, flattened; to fp32 and back
    return sent + (3 * 4 + 4 + width) / ranks  # added in fp32 and copied back by the rank that keeps it


def sent_bytes(config: Config, ranks: int) -> float:
    """Bytes that a rank sends in a step: gradients to the ranks that sum them, weights to those that use them."""
    parallel, trainer = config.parallel, config.trainer
    width, micro_batches = dtype_of(trainer.dtype).itemsize, trainer.batch_rows / ranks / trainer.micro_rows
    reductions = 1 if parallel.zero_stage == 1 else micro_batches
    gathers = 2 * micro_batches if parallel.zero_stage == 3 else 1  # for forward and backward, or after the step
    of_gradient = {"fp32": 4, "bf16": 2}[parallel.reduce_dtype]
    return _parameters(config) * (1 - 1 / ranks) * (reductions * of_gradient + gathers * width)


def share_at(size: int, measured: Mapping[int, float]) -> float:
    """Share of the peak: between measured sizes on a line over their logarithm, beyond them the nearest one's."""
    sizes = sorted(measured)
    return float(np.interp(np.log(size), np.log(sizes), [measured[size] for size in sizes]))


def step_seconds(config: Config, kind: str, ranks: int, shares: Shares | None = None) -> dict[str, float]:
    """Seconds of a step by part, of a run with one stage (`data.stages.at_stage`); `shares` of `kind` by default."""
    shares = SHARES[kind] if shares is None else shares
    return {
        part: floor / (share_at(size_of(part, config), shares[part]) if part in shares else 1.0)
        for part, floor in floors(config, GPUS[kind], ranks).items()
    }


def predictable(config: Config) -> bool:
    """Whether the shares say anything about a run: they are of bf16, with the optimizer's state on the GPU."""
    return dtype_of(config.trainer.dtype).itemsize == 2 and config.parallel.offload_optimizer == "none"


def run_seconds(config: Config, kind: str, ranks: int) -> float:
    """Seconds of all steps of all stages."""
    stages = stages_of(config)
    ends = [*(stage.first_step for stage in stages[1:]), config.trainer.steps]
    return sum(
        (end - stage.first_step) * sum(step_seconds(at_stage(config, stage, ranks), kind, ranks).values())
        for stage, end in zip(stages, ends, strict=True)
    )


def fitted(config: Config, gpu: Gpu, ranks: int, ms: Mapping[str, float]) -> dict[str, dict[int, float]]:
    """Shares from the GPU time of a step by part, as `bench training` keeps it; of a run with one stage.

    Time of a part without a floor, such as the embedding, counts as `other`.
    """
    floor = floors(config, gpu, ranks)
    seconds: dict[str, float] = {}
    for name, value in ms.items():
        part = name if name in floor else "other"
        seconds[part] = seconds.get(part, 0.0) + value / 1e3
    return {part: {size_of(part, config): floor[part] / time} for part, time in seconds.items() if time > 0}


def _tokens(config: Config, ranks: int) -> float:
    return config.trainer.batch_rows * config.trainer.seq_len / ranks


def _parameters(config: Config) -> int:
    return sum(total for total, _ in parameters_by_part(meta_model(config)).values())
