"""The public NSA op: packed documents in, gated sum of the three branches out.

    from nsa_train.ops.nsa import NSASpec, nsa_attention, compressed_lengths

Dimension letters and equations: `nsa_train.ops.reference`.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from nsa_train.ops.reference import NSADetails, NSASpec, nsa_reference

__all__ = ["NSADetails", "NSASpec", "compressed_lengths", "nsa_attention"]

Backend = Literal["auto", "reference", "triton"]


def compressed_lengths(cu_seqlens: Tensor, spec: NSASpec) -> Tensor:
    """Compressed keys of each document, int32 [N]: (L - l) // d + 1 where L >= l, else 0."""
    lengths = cu_seqlens.diff()
    return torch.where(lengths >= spec.cmp_block, (lengths - spec.cmp_block) // spec.cmp_stride + 1, 0).to(torch.int32)


@overload
def nsa_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor,
    gates: Tensor, spec: NSASpec, cu_seqlens: Tensor, scale: float | None = ..., blocks: Tensor | None = ...,
    backend: Backend = ..., return_details: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def nsa_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor,
    gates: Tensor, spec: NSASpec, cu_seqlens: Tensor, scale: float | None = ..., blocks: Tensor | None = ...,
    backend: Backend = ..., *, return_details: Literal[True],
) -> tuple[Tensor, NSADetails]: ...  # fmt: skip
def nsa_attention(
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, spec, cu_seqlens,
    scale=None, blocks=None, backend="auto", return_details=False,
):  # fmt: skip
    """Native Sparse Attention over packed documents (paper eq. 5, with eq. 8 to 12 inside).

    q             [T, Hq, D]
    k_cmp, v_cmp  [C, Hk, D], [C, Hk, Dv]   compressed, document after document without gaps;
                                            C >= sum(compressed_lengths), rows behind are ignored
    k_slc, v_slc  [T, Hk, D], [T, Hk, Dv]
    k_win, v_win  [T, Hk, D], [T, Hk, Dv]
    gates         [T, Hq, 3]                cmp, slc, win
    cu_seqlens    [N + 1]      int32        document bounds 0 ... T on q's device; equal bounds: empty documents
    scale                                   default D**-0.5
    blocks        [T, Hk, n]   int32        use these instead of selecting: ascending, own block among them, -1 last
    gives         [T, Hq, Dv]  dtype of q, and NSADetails with `return_details`

    Raises ValueError for shapes that do not fit together and for a backend that is not there.
    """
    if backend not in ("auto", "reference"):
        raise ValueError(f"backend={backend!r} is not available in this version; use 'auto' or 'reference'")
    _check_shapes(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, spec, cu_seqlens, blocks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, details = nsa_reference(
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, spec, cu_seqlens, scale, blocks
    )  # fmt: skip
    return (o, details) if return_details else o


def _check_shapes(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, spec, cu_seqlens, blocks) -> None:
    if q.ndim != 3 or v_slc.ndim != 3:
        raise ValueError(f"nsa_attention: q is {tuple(q.shape)} and v_slc {tuple(v_slc.shape)}, not [T, heads, width]")
    T, Hq, D = q.shape
    Hk, Dv = v_slc.shape[1:]
    C = k_cmp.shape[0]
    wanted = {
        "k_cmp": (k_cmp, (C, Hk, D)), "v_cmp": (v_cmp, (C, Hk, Dv)), "k_slc": (k_slc, (T, Hk, D)),
        "v_slc": (v_slc, (T, Hk, Dv)), "k_win": (k_win, (T, Hk, D)), "v_win": (v_win, (T, Hk, Dv)),
        "gates": (gates, (T, Hq, 3)),
    }  # fmt: skip
    if blocks is not None:
        wanted["blocks"] = (blocks, (T, Hk, spec.slc_count))
    found = [f"{name} is {tuple(x.shape)}, not {shape}" for name, (x, shape) in wanted.items() if x.shape != shape]
    if Hq % Hk:
        found.append(f"{Hq} query heads are not a multiple of {Hk} KV heads")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
        found.append(f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, not int32 [N + 1]")
    if found:
        raise ValueError("nsa_attention: " + "; ".join(found))
