"""Inputs of the sliding window, what the reference makes of them, and a run of one of its modules."""

import math

import torch

from nsa_train.ops import window
from nsa_train.ops.documents import Documents
from nsa_train.ops.reference import NSASpec, attend, win_visible
from nsa_train.packing import Packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("o", "lse", "dq", "dk", "dv")


def spec(w):
    return NSASpec(cmp_block=4, cmp_stride=2, slc_block=4, slc_count=3, slc_init=1, slc_local=1, window=w)


def inputs(lengths, Hk=1, G=2, D=8, Dv=6, seed=0, dtype=torch.float32):
    """q, k, v, do, and gate [T, Hq] in fp32."""
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    shapes = (T, Hk * G, D), (T, Hk, D), (T, Hk, Dv), (T, Hk * G, Dv)
    tensors = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    return (*tensors, torch.rand(T, Hk * G, generator=generator).to(DEVICE) + 0.1)


def expected(lengths, w, q, k, v, do, gate, scale, dtype=torch.float64):
    """o, lse and the gradients of sum(do * gate * o) by autograd, document by document, in `dtype`."""
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    outputs, lses = [], []
    G = q.shape[1] // k.shape[1]
    for one in torch.arange(len(q), device=q.device).split(lengths):
        seen = win_visible(len(one), w, q.device)
        outputs.append(attend(q[one], k[one], v[one], seen, scale)[0])
        with torch.no_grad():
            s = torch.einsum("thd,shd->hts", q[one], k[one].repeat_interleave(G, 1)) * scale
            lses.append((s.masked_fill(~seen, -torch.inf).logsumexp(-1) / math.log(2)).T)
    o = torch.cat(outputs)
    (o * gate[..., None] * do).sum().backward()
    return o, torch.cat(lses), q.grad, k.grad, v.grad


def computed(lengths, w, q, k, v, do, gate, scale, dq=None, empty=0, module=window):
    documents = Documents(Packing.from_lengths(lengths, len(lengths) + empty).cu_seqlens.to(DEVICE), len(q), spec(w))
    o, lse = module.forward(q, k, v, documents, spec(w), scale)
    grad_q = torch.full_like(q, torch.nan) if dq is None else dq.clone()
    delta = (do.float() * o.float()).sum(-1)
    dk, dv = module.backward(
        q, k, v, do, lse - gate.log2(), delta, documents, spec(w), scale, grad_q, accumulate=dq is not None
    )
    return o, lse, grad_q, dk, dv
