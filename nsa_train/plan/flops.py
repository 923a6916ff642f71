"""How many floating-point operations a configuration takes for a token, by part, as NSA executes them."""

from __future__ import annotations

import numpy as np

from nsa_train.config.schema import Config
from nsa_train.model.counts import meta_model, parameters_by_part


def keys_read(config: Config) -> dict[str, float]:
    """Keys that a query reads in each branch, mean over the queries of one document of seq_len tokens."""
    a, t = config.attention, np.arange(config.trainer.seq_len)
    keys = {
        "full": t + 1,
        "cmp": np.maximum(0, (t + 1 - a.cmp_block) // a.cmp_stride + 1),
        "slc": np.minimum(t, (a.slc_count - 1) * a.slc_block + t % a.slc_block) + 1,
        "win": np.minimum(t + 1, a.window),
    }
    return {branch: float(keys[branch].mean()) for branch in a.branches}


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
