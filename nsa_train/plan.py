"""What a configuration will cost, before anything starts: parameters, FLOPs and memory, by part."""

from __future__ import annotations

import torch

from nsa_train.config.schema import Config
from nsa_train.model.counts import meta_model, parameters_by_part
from nsa_train.runtime import dtype_of

RANKS = (1, 8, 64)


def keys_read(config: Config) -> dict[str, float]:
    """Keys that a query reads in each branch, mean over the queries of one document of seq_len tokens."""
    a, L = config.attention, config.trainer.seq_len
    compressed = [max(0, (t + 1 - a.cmp_block) // a.cmp_stride + 1) for t in range(L)]
    selected = [min(t + 1, (a.slc_count - 1) * a.slc_block + t % a.slc_block + 1) for t in range(L)]
    window = [min(t + 1, a.window) for t in range(L)]
    mean = {"full": (L + 1) / 2, "cmp": sum(compressed) / L, "slc": sum(selected) / L, "win": sum(window) / L}
    return {branch: mean[branch] for branch in a.branches}


def attention_flops(config: Config) -> dict[str, float]:
    """Forward FLOPs of a token in all layers, by branch: two products of 2 FLOPs per key, head and channel."""
    m = config.model
    per_key = 2.0 * m.heads * (m.key_dim + m.value_dim) * m.layers
    return {branch: keys * per_key for branch, keys in keys_read(config).items()}


def phi_flops(config: Config) -> float:
    """Forward FLOPs of phi per token: every d tokens a block of l tokens meets phi's matrices, once per KV head."""
    a, m = config.attention, config.model
    if "cmp" not in a.branches:
        return 0.0
    block = a.cmp_block
    per_head = {
        "mlp": sum(2 * (block * d * d + d * d) for d in (m.key_dim, m.value_dim)),
        "linear": sum(2 * block * d * d for d in (m.key_dim, m.value_dim)),
        "gated_pool": sum(4 * block * d for d in (m.key_dim, m.value_dim)),
        "mean": sum(block * d for d in (m.key_dim, m.value_dim)),
    }[a.phi]
    return per_head * m.kv_heads * m.layers / a.cmp_stride


def linear_flops(config: Config) -> dict[str, float]:
    """Forward FLOPs of a token in the linear layers, by part: 2 per parameter that it uses."""
    parts = parameters_by_part(meta_model(config))
    flops = {
        part: 2.0 * active for part, (_, active) in parts.items() if active and part not in ("norms", "compression")
    }
    return {**flops, "head": 2.0 * config.model.vocab * config.model.width}


def importance_flops(config: Config) -> float:
    """Forward FLOPs of a token for eq. 8: queries meet the compressed keys once more. It has no backward pass."""
    a, m = config.attention, config.model
    if not {"cmp", "slc"} <= set(a.branches) or a.selection != "topn":
        return 0.0
    return 2.0 * m.heads * m.key_dim * m.layers * keys_read(config)["cmp"]


def forward_flops(config: Config) -> dict[str, float]:
    """FLOPs of a token's forward pass by part, in one document of seq_len tokens."""
    flops = linear_flops(config)
    if "cmp" in config.attention.branches:
        flops |= {"compression": phi_flops(config), "importance": importance_flops(config)}
    return flops | {f"attention, {branch}": n for branch, n in attention_flops(config).items()}


def training_flops(config: Config) -> float:
    """FLOPs of a token in training: backward is twice forward, for all parts that have one; no recomputation."""
    return 3 * sum(forward_flops(config).values()) - 2 * importance_flops(config)


def state_gib(parameters: int, zero_stage: int, dtype: torch.dtype, ranks: int) -> float:
    """GiB of weights, gradients and optimizer state on one rank; activations come on top."""
    width = 2 if dtype == torch.bfloat16 else 4
    gradients = width if zero_stage == 1 else 4 / ranks
    weights = width / ranks if zero_stage == 3 else width
    return parameters * (weights + gradients + 12 / ranks) / 2**30


def plan(config: Config) -> str:
    """The report of `nsa-train plan`."""
    parts = parameters_by_part(meta_model(config))
    total, active = (sum(column) for column in zip(*parts.values(), strict=True))
    trainer, dtype = config.trainer, dtype_of(config.trainer.dtype)
    lines = [f"{config.name}: {config.model.layers} layers, width {config.model.width}, {config.arm} attention", ""]
    lines += [f"{'parameters':22}{'total':>18}{'active per token':>20}"]
    lines += [f"  {part:20}{n:>18,}{used:>20,}" for part, (n, used) in parts.items()]
    lines += [f"  {'all':20}{total:>18,}{active:>20,}   (embedding and head are not active)", ""]

    flops = forward_flops(config)
    forward, training = sum(flops.values()), training_flops(config)
    lines += [f"forward FLOPs per token in one document of {trainer.seq_len} tokens"]
    lines += [f"  {part:20}{n / 1e6:>14,.2f} M{n / forward:>8.1%}" for part, n in flops.items()]
    lines += [f"  {'all':20}{forward / 1e6:>14,.2f} M"]
    tokens = trainer.batch_rows * trainer.seq_len
    lines += [
        f"  training takes {training / forward:.2f} times that: {training * tokens / 1e12:,.3f} TFLOP a step of "
        f"{tokens:,} tokens, {training * tokens * trainer.steps / 1e15:,.4f} PFLOP for {trainer.steps} steps",
        "",
    ]
    lines += [
        f"GiB per rank for weights, gradients and optimizer state, {str(dtype)[6:]}, ZeRO {config.parallel.zero_stage}"
    ]
    lines += [
        f"  {ranks:>3} ranks {state_gib(total, config.parallel.zero_stage, dtype, ranks):>12,.2f}" for ranks in RANKS
    ]
    logits = min(trainer.loss_chunk_tokens, trainer.micro_rows * trainer.seq_len) * config.model.vocab * 4 * 2 / 2**30
    lines += [f"  logits of one loss chunk {logits:,.2f}; activations come on top"]
    return "\n".join(lines)
