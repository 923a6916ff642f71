"""The op in fp32 for a few queries: how the kernels are checked at lengths the reference has no memory for.

If only these queries have a gradient, the gradients of all keys and values are those of the few queries, so that one
backward pass of the kernels can be compared in full.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_train.ops.nsa import NSASpec, compressed_lengths
from nsa_train.ops.reference import attend, gated_sum


def attention_of_rows(
    rows: Tensor, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor,
    gates: Tensor, spec: NSASpec, cu_seqlens: Tensor, scale: float, blocks: Tensor,
) -> Tensor:  # fmt: skip
    """[R, Hq, Dv] fp32 of the queries `rows` [R]; the other arguments as in `nsa_attention`, differentiable."""
    T, device = q.shape[0], q.device
    wide = [x.float() for x in (q[rows], k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates[rows])]
    query, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate = wide
    starts, sizes = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    document = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes, output_size=T)
    place = torch.arange(T, device=device) - starts[document]
    t, own = place[rows], document[rows]
    before = (document == own[:, None]) & (place <= t[:, None])  # [R, T]

    C = k_cmp.shape[0]
    counts = compressed_lengths(cu_seqlens, spec).long()
    used = int(counts.sum())
    key_document = torch.full((C,), -1, device=device)
    key_document[:used] = torch.repeat_interleave(torch.arange(len(counts), device=device), counts)
    first_row = counts.cumsum(0) - counts
    key = torch.arange(C, device=device) - first_row[key_document.clamp(min=0)]
    last_token = key * spec.cmp_stride + spec.cmp_block - 1
    seen = (key_document == own[:, None]) & (last_token <= t[:, None])
    k_cmp, v_cmp = (torch.where((key_document >= 0)[:, None, None], x, 0.0) for x in (k_cmp, v_cmp))

    chosen = (place // spec.slc_block == blocks[rows][..., None]).any(-2)  # [R, Hk, T]
    o_cmp, _ = attend(query, k_cmp, v_cmp, seen, scale)
    o_slc, _ = attend(query, k_slc, v_slc, chosen & before[:, None], scale)
    o_win, _ = attend(query, k_win, v_win, before & (place > t[:, None] - spec.window), scale)
    return gated_sum(gate, [o_cmp, o_slc, o_win])
