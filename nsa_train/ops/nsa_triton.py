"""The whole NSA op on Triton kernels, registered with PyTorch so that autograd and torch.compile treat it as one node.

Forward: compressed attention, selection by its log-sum-exps, selected attention, window, gated sum. Backward: the
gated sum's backward gives each branch `delta` and a log-sum-exp that already holds the gate, so a branch runs on the
gradient of the op's output itself and no gradient of a branch's output is ever written; the branches add up one dq.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch
from torch import Tensor

from nsa_train.ops import (
    combine,
    compressed,
    compressed_hopper,
    select,
    select_hopper,
    selected,
    selected_hopper,
    window,
    window_hopper,
)
from nsa_train.ops.documents import Documents
from nsa_train.ops.reference import NSASpec
from nsa_train.ops.tiles import is_hopper

log = logging.getLogger("nsa_train")

PARTS: dict[str, tuple[ModuleType, ModuleType]] = {  # plain Triton, and Hopper
    "compressed": (compressed, compressed_hopper),
    "select": (select, select_hopper),
    "selected": (selected, selected_hopper),
    "window": (window, window_hopper),
}


def part(name: str, q: Tensor, k: Tensor, v: Tensor, spec: NSASpec) -> ModuleType:
    """The kernels of a part for these inputs: the Hopper ones where they take them, else plain Triton."""
    plain, hopper = PARTS[name]
    if not is_hopper(q.device):
        return plain
    if hopper.takes(q, k, v, spec):
        return hopper
    Hq, D = q.shape[1:]
    Hk, Dv = v.shape[1:]
    _log_plain(name, q.dtype, Hq // Hk, D, Dv, spec)
    return plain


@functools.cache
def _log_plain(name: str, dtype: torch.dtype, G: int, D: int, Dv: int, spec: NSASpec) -> None:
    log.info("%s attention runs on its plain Triton kernels for %s, G=%d, %d/%d, %s", name, dtype, G, D, Dv, spec)


@torch.library.custom_op("nsa_train::nsa_forward", mutates_args=())
def nsa_forward(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor,
    gates: Tensor, cu_seqlens: Tensor, blocks: Tensor | None, spec: list[int], scale: float,
) -> list[Tensor]:  # fmt: skip
    """[out, blocks, o_cmp, o_slc, o_win, lse_cmp, lse_slc, lse_win]; shapes as in `nsa_attention`, lse [T, Hq] fp32."""
    sizes = NSASpec(*spec)
    documents = Documents(cu_seqlens, q.shape[0], sizes)
    k_cmp, v_cmp = documents.used_rows(k_cmp), documents.used_rows(v_cmp)  # wide loads may touch those behind
    o_cmp, lse_cmp = part("compressed", q, k_cmp, v_cmp, sizes).forward(q, k_cmp, v_cmp, documents, sizes, scale)
    if blocks is None:
        blocks = part("select", q, k_cmp, v_cmp, sizes).select_blocks(q, k_cmp, lse_cmp, documents, sizes, scale)
    else:
        blocks = blocks.clone()  # an op's output may not be its input
    o_slc, lse_slc = part("selected", q, k_slc, v_slc, sizes).forward(q, k_slc, v_slc, blocks, documents, sizes, scale)
    o_win, lse_win = part("window", q, k_win, v_win, sizes).forward(q, k_win, v_win, documents, sizes, scale)
    out = combine.forward(gates, o_cmp, o_slc, o_win)
    return [out, blocks, o_cmp, o_slc, o_win, lse_cmp, lse_slc, lse_win]


@nsa_forward.register_fake
def _(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, cu_seqlens, blocks, spec, scale):
    T, Hq, _ = q.shape
    Hk, Dv = v_slc.shape[1:]
    out, *outputs = (q.new_empty(T, Hq, Dv) for _ in range(4))
    lses = (q.new_empty(T, Hq, dtype=torch.float32) for _ in range(3))
    return [out, cu_seqlens.new_empty(T, Hk, NSASpec(*spec).slc_count), *outputs, *lses]


@torch.library.custom_op("nsa_train::nsa_backward", mutates_args=())
def nsa_backward(
    do: Tensor, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor,
    gates: Tensor, cu_seqlens: Tensor, blocks: Tensor, outputs: list[Tensor], lses: list[Tensor],
    spec: list[int], scale: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates."""
    sizes = NSASpec(*spec)
    documents = Documents(cu_seqlens, q.shape[0], sizes)
    k_cmp, v_cmp = documents.used_rows(k_cmp), documents.used_rows(v_cmp)  # wide loads may touch those behind
    dgates, delta, lse = combine.backward(do, gates, outputs, lses)
    dq = torch.empty_like(q)
    dk_slc, dv_slc = part("selected", q, k_slc, v_slc, sizes).backward(
        q, k_slc, v_slc, blocks, do, lse[1], delta[1], documents, sizes, scale, dq, accumulate=False
    )
    dk_win, dv_win = part("window", q, k_win, v_win, sizes).backward(
        q, k_win, v_win, do, lse[2], delta[2], documents, sizes, scale, dq, accumulate=True
    )
    dk_cmp, dv_cmp = part("compressed", q, k_cmp, v_cmp, sizes).backward(
        q, k_cmp, v_cmp, do, lse[0], delta[0], documents, sizes, scale, dq, accumulate=True
    )
    return [dq, dk_cmp, dv_cmp, dk_slc, dv_slc, dk_win, dv_win, dgates]


@nsa_backward.register_fake
def _(do, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, cu_seqlens, blocks, outputs, lses, spec, scale):
    return [torch.empty_like(x) for x in (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)]


def _save(ctx, inputs, output) -> None:
    *tensors, _blocks, spec, scale = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)  # only the first output has a gradient: no zeros for the branches' outputs
    ctx.sizes = spec, scale


def _backward(ctx, grads):
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, cu_seqlens, blocks, *rest = ctx.saved_tensors
    do = torch.zeros_like(rest[0]) if grads[0] is None else grads[0].contiguous()
    found = nsa_backward(
        do, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, cu_seqlens, blocks, rest[:3], rest[3:], *ctx.sizes
    )
    return (*found, None, None, None, None)


nsa_forward.register_autograd(_backward, setup_context=_save)
