"""Random packed inputs of the compressed branch alone, and what the reference makes of them."""

import torch
from helpers import assert_close, slices

from nsa_train.ops import compressed
from nsa_train.ops.documents import Documents
from nsa_train.ops.nsa import NSASpec
from nsa_train.ops.reference import attend, cmp_visible, compressed_length
from nsa_train.ops.tiles import LOG2E
from nsa_train.packing import Packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPEC = NSASpec(cmp_block=4, cmp_stride=2, slc_block=4, slc_count=3, slc_init=1, slc_local=1)
SPARE = 2  # rows of NaN behind the last key


def inputs(lengths, spec=SPEC, Hq=4, Hk=2, D=16, Dv=16, empty=0, spare=SPARE, seed=0, dtype=torch.float32):
    """Random q, k, v, do, gates (0 to 1) and the documents; `spare` rows of NaN lie behind the last key."""
    generator = torch.Generator().manual_seed(seed)
    T, C = sum(lengths), sum(compressed_length(n, spec) for n in lengths)
    shapes = {"q": (T, Hq, D), "k": (C, Hk, D), "v": (C, Hk, Dv), "do": (T, Hq, Dv), "gates": (T, Hq)}
    x = {name: torch.randn(shape, generator=generator).to(DEVICE, dtype) for name, shape in shapes.items()}
    x["gates"] = x["gates"].float().sigmoid()
    for name in ("k", "v"):
        x[name] = torch.cat([x[name], torch.full((spare, *x[name].shape[1:]), torch.nan, device=DEVICE, dtype=dtype)])
    cu_seqlens = Packing.from_lengths(lengths, len(lengths) + empty).to(DEVICE).cu_seqlens
    return x, Documents(cu_seqlens, T, spec)


def expected(x, lengths, spec, scale):
    """The reference's o, lse and gradients of <gate o, do> with respect to q, k, v; zeros behind the last key."""
    q, k, v = (x[name].detach().float().requires_grad_() for name in "qkv")
    parts, lses = [], []
    for tokens, rows in slices(lengths, spec):
        L = tokens.stop - tokens.start
        visible = cmp_visible(L, spec, q.device)
        parts.append(attend(q[tokens], k[rows], v[rows], visible, scale)[0])
        G = q.shape[1] // k.shape[1]
        s = torch.einsum("thd,chd->thc", q[tokens], k[rows].repeat_interleave(G, 1)) * scale
        s = s.masked_fill(~visible[:, None], -torch.inf)
        lses.append(torch.where(visible.any(-1)[:, None], torch.logsumexp(s, -1) * LOG2E, torch.inf))
    o = torch.cat(parts)
    grads = torch.autograd.grad((o * x["gates"][..., None] * x["do"]).sum(), (q, k, v))
    return [y.detach() for y in (o, torch.cat(lses), *(g.nan_to_num(0.0) for g in grads))]


def backward_arguments(x, o, lse):
    """do, lse' = lse - log2 g, delta = <do, o>, as the whole op hands them to its branches."""
    return x["do"], lse - x["gates"].log2(), (x["do"].float() * o).sum(-1)


def run(x, documents, spec=SPEC, scale=0.3, dq=None, module=compressed):
    """o, lse, dq, dk, dv; dq starts as NaN, or is added to."""
    o, lse = module.forward(x["q"], x["k"], x["v"], documents, spec, scale)
    target = torch.full_like(x["q"], torch.nan) if dq is None else dq
    dk, dv = module.backward(
        x["q"], x["k"], x["v"], *backward_arguments(x, o, lse), documents, spec, scale, target, dq is not None
    )
    return o, lse, target, dk, dv


def check(got, want, rms=1e-5):
    seen = want[1].isfinite()
    assert torch.equal(got[1] == torch.inf, ~seen)
    assert_close("lse", got[1][seen], want[1][seen], rms)
    for name, i in (("o", 0), ("dq", 2), ("dk", 3), ("dv", 4)):
        assert_close(name, got[i], want[i], rms)
    behind = want[3].shape[0] - SPARE
    for name, x in (("o", got[0][~seen]), ("dq", got[2][~seen]), ("dk", got[3][behind:]), ("dv", got[4][behind:])):
        assert (x == 0).all(), f"{name}: zeros where nothing is seen, and in the {SPARE} rows behind the last key"
