"""Compression by segments against `reference.phi_*` of the unfolded blocks, in float64, every kind and gradient."""

import pytest
import torch
from helpers import assert_close

from nsa_train.ops import reference
from nsa_train.ops.compress import KINDS, compress
from nsa_train.ops.reference import NSASpec, compressed_length
from nsa_train.ops.segments import Segments
from nsa_train.packing import Packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PHI = {
    "mlp": reference.phi_mlp, "linear": reference.phi_linear, "gated_pool": reference.phi_gated_pool,
    "mean": reference.phi_mean,
}  # fmt: skip
SPECS = [(4, 2), (3, 1), (6, 2), (4, 4), (1, 1)]  # l, d
PACKS = [[19, 3, 26], [1, 4, 5, 3, 7, 2], [6], [2, 1]]


def spec_of(l, d):  # noqa: E741
    return NSASpec(cmp_block=l, cmp_stride=d, slc_block=d, slc_count=3, slc_init=1, slc_local=1, window=5)


def parameters(kind, l, width, dtype=torch.float64):  # noqa: E741
    shapes = {
        "mlp": [(width, l * width), (width,), (width, width)], "linear": [(width, l * width), (width,)],
        "gated_pool": [(width,), (l,)], "mean": [],
    }[kind]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE, dtype).requires_grad_() for s in shapes]


def tokens(T, Hk=2, width=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(T, Hk, width, generator=generator, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()


def segments_of(lengths, spec, empty=0):
    cu_seqlens = Packing.from_lengths(lengths, len(lengths) + empty).cu_seqlens.to(DEVICE)
    return Segments(cu_seqlens, sum(lengths), spec), cu_seqlens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SPECS, ids=str)
@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_blocks_and_gradients_are_those_of_the_reference(kind, sizes, lengths):
    spec = spec_of(*sizes)
    segments, cu_seqlens = segments_of(lengths, spec, empty=2)
    x, weights = tokens(sum(lengths)), parameters(kind, spec.cmp_block, 3)
    rows = sum(lengths) // spec.cmp_stride
    used = sum(compressed_length(n, spec) for n in lengths)
    got = compress(x, segments, kind, *weights)
    assert got.shape == (rows, 2, 3)
    assert torch.equal(got[used:], torch.zeros_like(got[used:]))
    want = PHI[kind](reference.compressed_blocks(x, cu_seqlens, spec, rows), *weights)[:used]
    if used == 0:
        found = torch.autograd.grad(got.sum(), [x, *weights])
        assert all(torch.equal(g, torch.zeros_like(g)) for g in found)
        return
    assert_close("blocks", got[:used], want, rms=1e-12)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(DEVICE)
    got_grads = torch.autograd.grad((got[:used] * weight).sum(), [x, *weights])
    for name, a, b in zip(
        ("x", "w1", "bias", "w2"), got_grads, torch.autograd.grad((want * weight).sum(), [x, *weights]), strict=False
    ):
        if spec.cmp_block == 1 and kind == "gated_pool" and name != "x":
            assert a.abs().max() < 1e-12  # one token has the whole share whatever its logit
        else:
            assert_close(f"gradient of {name}", a, b, rms=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    spec = spec_of(4, 2)
    segments, _ = segments_of([7, 3, 4], spec)
    weights = parameters(kind, 4, 3)
    torch.autograd.gradcheck(lambda x, *w: compress(x, segments, kind, *w), (tokens(14), *weights))


def test_first_token_is_the_packed_index_of_each_blocks_first_token():
    spec, lengths = spec_of(4, 2), [9, 3, 4, 11]
    segments, cu_seqlens = segments_of(lengths, spec, empty=1)
    index = torch.arange(27, device=DEVICE)[:, None, None]
    want = reference.compressed_blocks(index, cu_seqlens, spec, 13)[:, 0, 0, 0]
    assert segments.used.tolist() == [True] * 8 + [False] * 5
    assert torch.equal(segments.first_token[:8], want[:8])
    assert segments.first_token.min() >= 0
    assert segments.first_token.max() < 27


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[9, 3, 11], [3, 2]], ids=str)
def test_tokens_of_no_block_are_not_read_and_get_no_gradient(kind, lengths):
    """NaN in documents without a block and behind the last whole segment leaves every value and gradient as it was."""
    spec = spec_of(4, 2)
    segments, _ = segments_of(lengths, spec)
    inside = torch.zeros(sum(lengths), dtype=torch.bool, device=DEVICE)
    if lengths[0] == 9:
        inside[:8], inside[12:22] = True, True
    found = []
    for poison in (0.0, torch.nan):
        x, weights = tokens(sum(lengths)), parameters(kind, 4, 3)
        with torch.no_grad():
            x[~inside] = poison
        y = compress(x, segments, kind, *weights)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum() + y.sum(), [x, *weights])))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    dx = found[1][1]
    assert torch.equal(dx[~inside], torch.zeros_like(dx[~inside]))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_near_the_reference_in_float32(kind):
    spec, lengths = spec_of(4, 2), [19, 3, 26]
    segments, cu_seqlens = segments_of(lengths, spec)
    x, weights = tokens(48, width=16, dtype=torch.bfloat16), parameters(kind, 4, 16, torch.bfloat16)
    with torch.no_grad():
        for w in weights:
            w *= 0.1
    wide = [p.detach().float().requires_grad_() for p in (x, *weights)]
    got = compress(x, segments, kind, *weights)
    assert got.dtype == torch.bfloat16
    want = PHI[kind](reference.compressed_blocks(wide[0], cu_seqlens, spec, 24), *wide[1:])[:20]
    assert_close("blocks", got[:20], want, rms=1e-2)
    got_grads = torch.autograd.grad(got[:20].float().square().sum(), [x, *weights])
    want_grads = torch.autograd.grad(want.square().sum(), wide)
    for name, a, b in zip(("x", "w1", "bias", "w2"), got_grads, want_grads, strict=False):
        assert_close(f"gradient of {name}", a, b, rms=2e-2)
