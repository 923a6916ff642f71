"""Inputs of the attention benchmark: tensors, document lengths, and which blocks the queries read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_train.ops.nsa import NSASpec
from nsa_train.packing import Packing

# Lengths of documents in a long-context corpus: log-normal, median 570 and mean 1,960 tokens.
MEDIAN_TOKENS, MEAN_TOKENS = 570, 1960


@dataclass(frozen=True)
class Shape:
    """T tokens, Hq query heads, Hk KV heads, key width D, value width Dv, bf16 or fp16."""

    T: int
    Hq: int = 64
    Hk: int = 4
    D: int = 192
    Dv: int = 128
    dtype: torch.dtype = torch.bfloat16


def realistic_lengths(T: int, seed: int = 0) -> list[int]:
    """Document lengths drawn from the log-normal above until T tokens are full; the last one is cut."""
    generator = torch.Generator().manual_seed(seed)
    sigma = math.sqrt(2 * math.log(MEAN_TOKENS / MEDIAN_TOKENS))
    lengths: list[int] = []
    while sum(lengths) < T:
        drawn = math.ceil(MEDIAN_TOKENS * math.exp(sigma * torch.randn((), generator=generator).item()))
        lengths.append(min(drawn, T - sum(lengths)))
    return lengths


def index_set(kind: str, packing: Packing, Hk: int, spec: NSASpec, device: torch.device, seed: int = 0) -> Tensor:
    """Chosen blocks [T, Hk, n] int32: forced ones and free ones of each query's document, ascending, -1 last.

    random  free blocks drawn anew for every token
    local   from token to token one free block is replaced by another: neighbours read nearly the same blocks
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    parts = [_document_indices(kind, length, Hk, spec, device, generator) for length in packing.lengths]
    return torch.cat(parts)


def _document_indices(
    kind: str, L: int, Hk: int, spec: NSASpec, device: torch.device, generator: torch.Generator
) -> Tensor:
    n, J = spec.slc_count, -(-L // spec.slc_block)
    j = torch.arange(J, device=device)
    # Place of each block among the free ones of a query in block m, in an order drawn for each head: [m, Hk, j].
    order = torch.rand(Hk, J, device=device, generator=generator).argsort(-1)
    free = (order >= spec.slc_init) & (order <= j[:, None, None] - spec.slc_local)
    rank = torch.empty_like(free, dtype=torch.int64).scatter_(-1, order.expand(J, -1, -1), free.cumsum(-1) - 1)
    chunks = []
    for t in torch.arange(L, device=device).split(max(1, 2**24 // (J * Hk))):
        m = t // spec.slc_block
        if kind == "random":
            age = torch.rand(len(t), Hk, J, device=device, generator=generator)
        else:
            age = (rank[m] - t[:, None, None]) % free.sum(-1)[m][..., None].clamp(min=1)
        own = m[:, None, None]
        forced = (j < spec.slc_init) | (j > own - spec.slc_local)
        age = age.float().masked_fill(forced, -1.0).masked_fill(j > own, torch.inf)
        best, chosen = age.topk(min(n, J), dim=-1, largest=False)
        chosen = chosen.masked_fill(best == torch.inf, J).sort(-1).values
        chosen = torch.nn.functional.pad(chosen, (0, n - chosen.shape[-1]), value=J)
        chunks.append(chosen.masked_fill(chosen == J, -1).to(torch.int32))
    return torch.cat(chunks)
