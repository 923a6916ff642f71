"""What several tests need: a comparison of tensors, random packed inputs of the op, documents, a script as a module."""

import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from nsa_train.data.selection import chosen, select
from nsa_train.model.layers import fixed_starts
from nsa_train.ops.nsa import NSASpec, nsa_attention
from nsa_train.ops.reference import compressed_length
from nsa_train.packing import Packing

SMALL = NSASpec(cmp_block=4, cmp_stride=2, slc_block=4, slc_count=3, slc_init=1, slc_local=1, window=5)
WIDE = NSASpec(cmp_block=4, cmp_stride=2, slc_block=8, slc_count=4, slc_init=1, slc_local=2, window=7)  # l' = 4 d
DIFFERENTIABLE = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
COMPRESSED = ("k_cmp", "v_cmp")


def assert_close(name, got, want, rms):
    """Relative root mean square of the difference is at most `rms`; zeros are no expectation."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    assert torch.isfinite(want).all(), f"{name}: the expected values are not finite"
    assert torch.isfinite(got).all(), f"{name}: {int((~torch.isfinite(got)).sum())} values are not finite"
    assert want.abs().max() > 0, f"{name}: the expected values are all zero, which proves nothing"
    difference = (got - want).abs()
    error = float(difference.square().mean().sqrt() / want.square().mean().sqrt())
    if error > rms:
        worst = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
        raise AssertionError(
            f"{name}: relative rms {error:.3g} > {rms:.3g}; worst at {worst}: {got[worst]:.6g}, not {want[worst]:.6g}"
        )


def documents(data, split):
    """Documents of one split in a fixed order, after filters and without duplicates."""
    return (document for place, document in chosen(data, select(data)) if place == split)


def load_script(name, monkeypatch):
    """scripts/<name>.py as a module, for one test."""
    path = Path(__file__).resolve().parents[1] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look for their own
    spec.loader.exec_module(module)
    return module


def start_fixed(module):
    """Set the parameters of a module whose initial values are not random."""
    for name, make in fixed_starts(module).items():
        parameter = module.get_parameter(name).data
        parameter.copy_(make(parameter.shape))


def packed_case(lengths, spec=SMALL, Hq=4, Hk=2, D=8, Dv=6, dtype=torch.float64, seed=0, empty=0, spare=0):
    """Random arguments of `nsa_attention` by name, leaves that want gradients.

    empty: empty documents at the end of cu_seqlens; spare: rows of k_cmp and v_cmp behind those of the documents.
    """
    generator = torch.Generator().manual_seed(seed)
    T, C = sum(lengths), sum(compressed_length(n, spec) for n in lengths) + spare
    shapes = {
        "q": (T, Hq, D), "k_cmp": (C, Hk, D), "v_cmp": (C, Hk, Dv), "k_slc": (T, Hk, D), "v_slc": (T, Hk, Dv),
        "k_win": (T, Hk, D), "v_win": (T, Hk, Dv), "gates": (T, Hq, 3),
    }  # fmt: skip
    case = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    case["gates"] = case["gates"].sigmoid()
    case = {name: x.to(dtype).requires_grad_() for name, x in case.items()}
    cu_seqlens = Packing.from_lengths(lengths, len(lengths) + empty).cu_seqlens
    return {**case, "spec": spec, "cu_seqlens": cu_seqlens}


def changed(case, **fields):
    """The case with other values; tensors are fresh leaves, so that gradients of two runs do not mix."""
    fresh = {k: x.detach().clone().requires_grad_() for k, x in case.items() if k in DIFFERENTIABLE}
    return {**case, **fresh, **fields}


def run(case, **arguments):
    """(output, NSADetails) of the op."""
    return nsa_attention(**case, **arguments, return_details=True)


def gradients(case, o, seed=1):
    """Gradient of a random projection of `o` with respect to every differentiable argument, by name."""
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(o.dtype)
    found = torch.autograd.grad((o * weight).sum(), [case[name] for name in DIFFERENTIABLE], allow_unused=True)
    return dict(zip(DIFFERENTIABLE, found, strict=True))


def slices(lengths, spec):
    """For each document: (its tokens, its rows of k_cmp)."""
    token = row = 0
    for n in lengths:
        C = compressed_length(n, spec)
        yield slice(token, token + n), slice(row, row + C)
        token, row = token + n, row + C


def alone(case, tokens, rows):
    """One document of a packed case as a case of its own."""
    cut = {k: case[k].detach()[rows if k in COMPRESSED else tokens].requires_grad_() for k in DIFFERENTIABLE}
    cu_seqlens = torch.tensor([0, tokens.stop - tokens.start], dtype=torch.int32)
    return {**case, **cut, "cu_seqlens": cu_seqlens}


def sdpa(q, k, v, visible=None):
    """PyTorch's attention of one document, [L, heads, width] in and out; causal without a mask."""
    G = q.shape[1] // k.shape[1]
    q, k, v = q.transpose(0, 1), k.repeat_interleave(G, 1).transpose(0, 1), v.repeat_interleave(G, 1).transpose(0, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None).transpose(0, 1)
