"""What NSA's selection does, in three numbers: the mass of the forced blocks, how far choices reach, how they drift."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_train.ops.reference import NSASpec, attend, slc_visible


@torch.no_grad()
def selection_statistics(q: Tensor, k_slc: Tensor, v_slc: Tensor, blocks: Tensor, spec: NSASpec) -> dict[str, float]:
    """Statistics over one document of L tokens; shapes as in `ops.reference`, blocks [L, Hk, n].

    forced_mass        share of the selected branch's attention that falls on forced blocks, mean over queries and heads
    distance_tokens    mean distance from a query's block to the free blocks it chose, in tokens
    neighbour_overlap  share of a query's blocks that the next query reads too
    """
    L = q.shape[0]
    m = torch.arange(L, device=q.device)[:, None, None] // spec.slc_block
    _, p = attend(q, k_slc, v_slc, slc_visible(blocks, L, spec), q.shape[-1] ** -0.5)
    j = torch.arange(L, device=q.device) // spec.slc_block
    forced_tokens = (j < spec.slc_init) | (j > m[:, 0] - spec.slc_local)  # [L, L]
    real = blocks >= 0
    free = real & (blocks >= spec.slc_init) & (blocks <= m - spec.slc_local)
    distance = ((m - blocks) * spec.slc_block)[free].float()
    taken = torch.nn.functional.one_hot(torch.where(real, blocks, 0).long(), L // spec.slc_block + 1)
    taken = (taken * real[..., None]).amax(-2)  # [L, Hk, J]
    kept = (taken[1:] * taken[:-1]).sum() / real[:-1].sum().clamp(min=1)
    return {
        "forced_mass": float((p * forced_tokens).sum(-1).mean()),
        "distance_tokens": float(distance.mean()) if distance.numel() else 0.0,
        "neighbour_overlap": float(kept),
    }
