"""The public NSA op: packed documents in, gated sum of the three branches out.

    from nsa_train.ops.nsa import NSASpec, nsa_attention, compressed_lengths

Dimension letters and equations: `nsa_train.ops.reference`.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Literal, overload

import torch
from torch import Tensor

from nsa_train.ops.documents import compressed_lengths
from nsa_train.ops.nsa_triton import nsa_forward
from nsa_train.ops.reference import NSADetails, NSASpec, nsa_reference
from nsa_train.ops.tiles import INTERPRETED, KERNEL_DTYPES

__all__ = ["NSADetails", "NSASpec", "compressed_lengths", "nsa_attention"]

Backend = Literal["auto", "reference", "triton"]


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
    backend                                 "reference": plain PyTorch, any dtype, O(L^2) memory, checks cu_seqlens;
                                            "triton": the kernels, gates >= 0, on a CPU only in Triton's interpreter;
                                            "auto": the kernels for bf16, fp16 and fp32 on a GPU, else the reference
    gives         [T, Hq, Dv]  dtype of q, and NSADetails with `return_details` (of the kernels: without gradient)

    Raises ValueError for shapes that do not fit together and for a backend that cannot run.
    """
    _check_shapes(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, spec, cu_seqlens, blocks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"nsa_attention: scale={scale} must be positive")
    if chosen_backend(backend, q) == "reference":
        o, details = nsa_reference(
            q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, spec, cu_seqlens, scale, blocks
        )  # fmt: skip
        return (o, details) if return_details else o
    tensors = (x.contiguous() for x in (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, cu_seqlens))
    blocks = None if blocks is None else blocks.contiguous()
    o, *found = nsa_forward(*tensors, blocks, list(astuple(spec)), scale)
    return (o, NSADetails(*(x.detach() for x in found[:4]))) if return_details else o


def chosen_backend(backend: str, q: Tensor) -> str:
    """ "reference" or "triton"; what "auto" means is said at `nsa_attention`. Raises ValueError where it cannot run."""
    if backend == "auto":
        return "triton" if q.is_cuda and q.dtype in KERNEL_DTYPES else "reference"
    if backend not in ("reference", "triton"):
        raise ValueError(f"backend={backend!r} must be 'auto', 'reference' or 'triton'")
    if backend == "triton" and q.dtype not in KERNEL_DTYPES:
        raise ValueError(f"backend='triton' takes bf16, fp16 and fp32, not {q.dtype}; use 'reference'")
    if backend == "triton" and not q.is_cuda and INTERPRETED and q.dtype == torch.bfloat16:
        raise ValueError("backend='triton': Triton's interpreter multiplies bf16 wrongly; use fp16 or fp32 there")
    if backend == "triton" and not q.is_cuda and not INTERPRETED:
        raise ValueError(
            f"backend='triton' needs CUDA tensors, q is on {q.device}; on a CPU it works only in Triton's interpreter "
            "(TRITON_INTERPRET=1 in the environment); use 'auto' or 'reference'"
        )
    return backend


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
    if not T:
        found.append("q has no tokens")
    if Hq % Hk:
        found.append(f"{Hq} query heads are not a multiple of {Hk} KV heads")
    if blocks is not None and blocks.dtype != torch.int32:
        found.append(f"blocks is {blocks.dtype}, not int32")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
        found.append(f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, not int32 [N + 1]")
    if found:
        raise ValueError("nsa_attention: " + "; ".join(found))
