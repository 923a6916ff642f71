"""The kernels of compression against its form in PyTorch, in Triton's interpreter: outputs and all gradients."""

import pytest
import torch
from helpers import assert_close
from torch.utils.checkpoint import checkpoint

from nsa_train.ops import compress
from nsa_train.ops.reference import NSASpec
from nsa_train.ops.segments import Segments
from nsa_train.packing import Packing

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_poison")
NAMES = ("y", "x", "w1", "bias", "w2")
KINDS = ("mlp", "linear", "mean")
CASES = [  # lengths; l, d; D
    ([19, 3, 26], 4, 2, 3), ([19, 3, 26], 4, 4, 3), ([1, 4, 5, 3, 7, 2], 3, 1, 5), ([9, 2, 11], 4, 2, 80),
    ([90, 1, 61], 40, 20, 16), ([2, 1, 1], 3, 1, 3), ([2, 1], 8, 4, 3),
]  # fmt: skip


def segments_of(lengths, l, d):  # noqa: E741
    spec = NSASpec(cmp_block=l, cmp_stride=d, slc_block=d, slc_count=3, slc_init=1, slc_local=1, window=5)
    cu_seqlens = Packing.from_lengths(lengths, len(lengths) + 1).cu_seqlens
    return Segments(cu_seqlens, sum(lengths), spec)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters(kind, l, D):  # noqa: E741
    shapes = {"mlp": [(D, l * D), (D,), (D, D)], "linear": [(D, l * D), (D,)], "mean": []}[kind]
    return [drawn(*shape, seed=i + 1) * shape[-1] ** -0.5 for i, shape in enumerate(shapes)]


def computed(x, segments, kind, weights, dy, monkeypatch, kernels):
    """The blocks, and the gradients of x and of the weights; kernels, or else the plain form."""
    monkeypatch.setattr(compress, "on_kernels", lambda x: kernels)
    x, *weights = leaves = [leaf.detach().requires_grad_() for leaf in (x, *weights)]
    y = compress.compress(x, segments, kind, *weights)
    return [y, *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_and_gradients_are_those_of_the_plain_form(kind, case, monkeypatch):
    """NaN in tokens of no block and in gradients behind the last block is not read."""
    lengths, l, d, D = case  # noqa: E741
    segments = segments_of(lengths, l, d)
    x, weights, dy = drawn(sum(lengths), 2, D), parameters(kind, l, D), drawn(len(segments.used), 2, D, seed=9)
    want = computed(x, segments, kind, weights, dy, monkeypatch, kernels=False)
    x[~segments.in_segment], dy[~segments.used] = torch.nan, torch.nan
    got = computed(x, segments, kind, weights, dy, monkeypatch, kernels=True)
    for name, a, b in zip(NAMES, got, want, strict=False):
        if segments.used.any():
            assert_close(name, a, b, rms=2e-6)
        else:
            assert torch.equal(a, torch.zeros_like(b)), name
    assert torch.equal(got[0][~segments.used], torch.zeros_like(got[0][~segments.used]))
    assert torch.equal(got[1][~segments.in_segment], torch.zeros_like(x[~segments.in_segment]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_wider_tensor_is_read_where_it_lies(kind, monkeypatch):
    """As one projection for K and V would give them."""
    segments, D = segments_of([19, 3, 26], 4, 2), 6
    wide, weights, dy = drawn(48, 5, 2 * D), parameters(kind, 4, D), drawn(24, 2, D, seed=9)
    for x in (wide[:, 1:3, D:], wide[:, :2, ::2]):
        want = computed(x, segments, kind, weights, dy, monkeypatch, kernels=False)
        got = computed(x, segments, kind, weights, dy, monkeypatch, kernels=True)
        for name, a, b in zip(NAMES, got, want, strict=False):
            assert_close(name, a, b, rms=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_gives_the_same_bits(kind, monkeypatch):
    monkeypatch.setattr(compress, "on_kernels", lambda x: True)
    segments = segments_of([9, 3, 6], 4, 2)
    leaves = [leaf.requires_grad_() for leaf in (drawn(18, 2, 6), *parameters(kind, 4, 6))]

    def phi(x, *weights):
        return compress.compress(x, segments, kind, *weights)

    found = [
        torch.autograd.grad(y.square().sum(), leaves)
        for y in (phi(*leaves), checkpoint(phi, *leaves, use_reentrant=False))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
