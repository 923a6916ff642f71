"""How many parameters a model has, and how many of them one token uses, by part."""

from __future__ import annotations

from functools import lru_cache

import torch

from nsa_train.config.schema import AttentionConfig, Config, ModelConfig, MoEConfig
from nsa_train.model.transformer import Transformer

# Part of a parameter: the first fragment that its name contains.
PARTS = {
    "embed.": "embedding",
    "head.": "head",
    ".phi_": "compression",
    ".attention.gate": "gates",
    ".attention.kv.": "keys and values",
    ".attention.": "queries and output",
    ".router.": "router",
    ".mlp.shared": "shared experts",
    ".mlp.gate_up.weight": "dense MLP",
    ".mlp.down.weight": "dense MLP",
    ".mlp.": "routed experts",
}


NOT_ACTIVE = ("embedding", "head")  # as the paper counts; they do no work inside the layers


def part_of(name: str) -> str:
    if "norm" in name:
        return "norms"
    return next(part for fragment, part in PARTS.items() if fragment in name)


def parameters_by_part(model: Transformer) -> dict[str, tuple[int, int]]:
    """part -> (total, active): a token uses top_k of the routed experts; embedding and head count as not active."""
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        part, total = part_of(name), parameter.numel()
        active = 0 if part in NOT_ACTIVE else total
        if part == "routed experts":
            active = total * model.moe.top_k // model.moe.experts
        before = counts.get(part, (0, 0))
        counts[part] = (before[0] + total, before[1] + active)
    return counts


def count_parameters(model: Transformer) -> dict[str, int]:
    """{"total", "active"} of the whole model."""
    counts = parameters_by_part(model).values()
    return {"total": sum(total for total, _ in counts), "active": sum(active for _, active in counts)}


def meta_model(config: Config) -> Transformer:
    """The model without memory, for counting; the same object for the same sizes."""
    return _meta_model(config.model, config.attention, config.moe)


@lru_cache(maxsize=4)
def _meta_model(model: ModelConfig, attention: AttentionConfig, moe: MoEConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(model, attention, moe)
