"""Inputs of selected attention, what the reference makes of them, and a run of one of its modules."""

import math

import torch

from nsa_train.ops import selected
from nsa_train.ops.documents import Documents
from nsa_train.ops.fixed_blocks import fixed_blocks
from nsa_train.ops.reference import NSASpec, attend, slc_visible
from nsa_train.packing import Packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("o", "lse", "dq", "dk", "dv")


def spec(block=4, count=3, init=1, local=1):
    return NSASpec(
        cmp_block=block, cmp_stride=1, slc_block=block, slc_count=count, slc_init=init, slc_local=local, window=5
    )


def inputs(lengths, sizes, Hk=1, G=2, D=8, Dv=6, seed=0, dtype=torch.float32):
    """q, k, v, blocks, do, gate [T, Hq]; blocks are chosen at random."""
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    shapes = (T, Hk * G, D), (T, Hk, D), (T, Hk, Dv), (T, Hk * G, Dv)
    q, k, v, do = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    positions = torch.cat([torch.arange(L) for L in lengths])
    blocks = fixed_blocks(positions, Hk, sizes, torch.tensor(0)).to(DEVICE)
    return q, k, v, blocks, do, torch.rand(T, Hk * G, generator=generator).to(DEVICE) + 0.1


def expected(lengths, sizes, q, k, v, blocks, do, gate, scale=0.3, dtype=torch.float64):
    """o, lse and the gradients of sum(do * gate * o) by autograd, document by document, in `dtype`."""
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    outputs, lses = [], []
    G = q.shape[1] // k.shape[1]
    for one in torch.arange(len(q), device=q.device).split(lengths):
        seen = slc_visible(blocks[one], len(one), sizes)
        outputs.append(attend(q[one], k[one], v[one], seen, scale)[0])
        with torch.no_grad():
            s = torch.einsum("thd,shd->hts", q[one], k[one].repeat_interleave(G, 1)) * scale
            s = s.masked_fill(~seen.transpose(0, 1).repeat_interleave(G, 0), -torch.inf)
            lses.append(s.logsumexp(-1).T / math.log(2))
    o = torch.cat(outputs)
    (o * gate[..., None] * do).sum().backward()
    return o, torch.cat(lses), q.grad, k.grad, v.grad


def table_of(lengths, sizes, empty=0):
    packing = Packing.from_lengths(lengths, len(lengths) + empty).to(DEVICE)
    return Documents(packing.cu_seqlens, packing.tokens, sizes)


def computed(lengths, sizes, q, k, v, blocks, do, gate, scale=0.3, dq=None, empty=0, module=selected):
    documents = table_of(lengths, sizes, empty)
    o, lse = module.forward(q, k, v, blocks, documents, sizes, scale)
    grad_q = torch.full_like(q, torch.nan) if dq is None else dq.clone()
    delta = (do.float() * o.float()).sum(-1)
    dk, dv = module.backward(
        q, k, v, blocks, do, lse - gate.log2(), delta, documents, sizes, scale, grad_q, accumulate=dq is not None
    )
    return o, lse, grad_q, dk, dv
