"""Routing on its kernels, in Triton's interpreter, against its form in PyTorch: outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

from nsa_train.ops import routing, routing_triton
from nsa_train.packing import Packing

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_poison", "small_sizes")
LENGTHS = (10, 1, 85, 9, 23)  # the third starts inside of a chunk and ends with one, at 96
NAMES = ("weights", "balance", "gradient")


@pytest.fixture
def small_sizes(monkeypatch):
    """Small cases still have several chunks and documents in one another, several tiles and several loads of bounds."""
    monkeypatch.setattr(routing_triton, "CHUNK", 32)
    monkeypatch.setattr(routing_triton, "ELEMENTS", 256)
    monkeypatch.setattr(routing_triton, "BOUNDS", 2)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outcome(monkeypatch, on_kernels, logits, bias, lengths=LENGTHS, K=3, empty=0, **rules):
    """experts, load, weights, balance, and the gradient of the logits from both."""
    monkeypatch.setattr(routing, "on_kernels", lambda x: on_kernels)
    logits = logits.clone().requires_grad_()
    cu_seqlens = Packing.from_lengths(lengths, len(lengths) + empty).cu_seqlens
    rules = {"softmax": False, "normalise": True, "scale": 1.0} | rules
    experts, weights, load, balance = routing.route(logits, bias, cu_seqlens, K, **rules)
    into = drawn(*weights.shape, seed=2)
    (gradient,) = torch.autograd.grad((weights * into).sum() + 0.1 * balance, logits)
    return experts, load, (weights, balance, gradient)


def compare(monkeypatch, *case, **options):
    got, want = (outcome(monkeypatch, on_kernels, *case, **options) for on_kernels in (True, False))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    for name, a, b in zip(NAMES, got[2], want[2], strict=True):
        assert_close(name, a, b, rms=1e-5)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_kernels_equal_the_plain_form(monkeypatch, softmax, normalise):
    case = drawn(sum(LENGTHS), 12), 0.3 * drawn(12, seed=1)
    compare(monkeypatch, *case, softmax=softmax, normalise=normalise, scale=2.5)


@pytest.mark.parametrize(("E", "K", "lengths", "empty"), [(3, 1, (5,), 0), (72, 6, (20, 9), 3), (16, 16, (4, 4), 1)])
def test_other_sizes_and_documents_without_tokens(monkeypatch, E, K, lengths, empty):
    compare(monkeypatch, drawn(sum(lengths), E), drawn(E, seed=1), lengths=lengths, K=K, empty=empty)


def test_more_experts_than_a_tile_holds_take_the_plain_form(monkeypatch):
    E = routing_triton.MOST_EXPERTS + 1
    got, want = (outcome(monkeypatch, on, drawn(5, E), drawn(E, seed=1), lengths=(5,)) for on in (True, False))
    assert torch.equal(got[2][2], want[2][2])


@pytest.mark.parametrize("on_kernels", [True, False])
def test_ties_go_to_the_lower_index(monkeypatch, on_kernels):
    logits = torch.zeros(7, 12)
    logits[:, 5] = 1.0
    experts, load, _ = outcome(monkeypatch, on_kernels, logits, torch.zeros(12), lengths=(7,), K=4)
    assert experts.tolist() == [[5, 0, 1, 2]] * 7
    assert load.tolist() == [7.0] * 3 + [0, 0, 7.0] + [0] * 6


@pytest.mark.parametrize("on_kernels", [True, False])
@pytest.mark.parametrize("logit", [torch.nan, torch.inf, -torch.inf])
def test_experts_have_a_number_whatever_the_logits(monkeypatch, on_kernels, logit):
    logits = drawn(7, 12)
    logits[3], logits[5, 2] = logit, logit
    experts, _, (weights, _, _) = outcome(monkeypatch, on_kernels, logits, torch.zeros(12), lengths=(7,), softmax=True)
    assert 0 <= experts.min() <= experts.max() < 12
    assert weights[:3].isfinite().all()


def test_scores_of_almost_zero_have_a_finite_gradient(monkeypatch):
    _, _, found = outcome(monkeypatch, True, drawn(7, 12) - 60.0, torch.zeros(12), lengths=(7,))
    assert all(x.isfinite().all() for x in found)


def test_two_runs_give_the_same_bits(monkeypatch):
    case = drawn(sum(LENGTHS), 12), drawn(12, seed=1)
    first, second = (outcome(monkeypatch, True, *case) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True))


def test_logits_of_bf16_and_their_gradients_are_those_of_fp32(monkeypatch):
    """The product in bf16 that a GPU has is done in fp32 here. A gradient of 8 bits would be 2e-3 off."""
    monkeypatch.setattr(routing, "product", lambda a, b: a.float() @ b.float())
    monkeypatch.setattr(routing, "on_kernels", lambda x: True)
    x, weight, grad = drawn(50, 24).bfloat16(), drawn(7, 24, seed=1).bfloat16(), drawn(50, 7, seed=2)
    found = []
    for form in (routing.router_logits, lambda x, w: F.linear(x.float(), w.float())):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = form(*leaves)
        assert out.dtype == torch.float32
        found.append([out, *torch.autograd.grad(out, leaves, grad)])
    for name, got, want, rms in zip(("logits", "x", "weight"), *found, (1e-6, 5e-4, 5e-4), strict=True):
        assert got.dtype == want.dtype
        assert_close(name, got, want, rms=rms)
