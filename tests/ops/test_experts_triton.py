"""The kernels of routed experts against their forms in PyTorch, in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

from nsa_train.ops import experts, experts_triton

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_poison")
WIDTHS = [1, 5, 16, 48, experts_triton.WIDEST + 6]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def routing(T, K, seed=0):
    """order [T * K] and places [T, K] of a random permutation of rows."""
    order = torch.randperm(T * K, generator=torch.Generator().manual_seed(seed))
    places = torch.zeros_like(order)
    places[order] = torch.arange(T * K)
    return order, places.view(T, K)


@pytest.mark.parametrize("R", [1, 3, 300])
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu_and_its_gradient(R, width):
    gate_up, grad = drawn(R, 2 * width).requires_grad_(), drawn(R, width, seed=1)
    gate, up = gate_up.chunk(2, -1)
    want = F.silu(gate) * up
    assert_close("out", experts_triton.swiglu(gate_up.detach()), want, rms=1e-6)
    (wanted,) = torch.autograd.grad(want, gate_up, grad)
    assert_close("gradient", experts_triton.swiglu_backward(gate_up.detach(), grad), wanted, rms=1e-6)


@pytest.mark.parametrize(("T", "K"), [(1, 1), (7, 2), (100, 6)])
@pytest.mark.parametrize("width", WIDTHS)
def test_sums_of_rows(T, K, width):
    _, places = routing(T, K)
    rows, weights = drawn(T * K, width), drawn(T, K, seed=1)
    for own in (weights, None):
        got = experts_triton.sum_rows(rows, places, own)
        assert_close("sum", got, experts.sum_rows(rows, places, own), rms=1e-6)


@pytest.mark.parametrize(("T", "K"), [(1, 1), (7, 2), (100, 6)])
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_tokens_go_to_their_places(T, K, width):
    order, places = routing(T, K)
    x = drawn(T, width)
    for module in (experts, experts_triton):
        assert torch.equal(module.spread_rows(x, places), x[order // K])


@pytest.mark.parametrize(("T", "K"), [(1, 1), (7, 2), (100, 3)])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_gradient_of_weighted_swiglu(T, K, width):
    order, _ = routing(T, K)
    gate_up, weights, grad = drawn(T * K, 2 * width), drawn(T, K, seed=1), drawn(T * K, width, seed=2)
    leaves = gate_up.requires_grad_(), weights.requires_grad_()
    gate, up = gate_up.chunk(2, -1)
    h = F.silu(gate) * up * weights.flatten()[order, None]
    d_gate_up, d_weights = torch.autograd.grad(h, leaves, grad)
    for module in (experts, experts_triton):
        got = module.weighted_swiglu_backward(gate_up.detach(), grad, order, weights.detach())
        for name, a, b in zip(("gate_up", "weighted", "weights"), got, (d_gate_up, h, d_weights), strict=True):
            assert_close(name, a, b, rms=1e-5)


def test_routed_experts_on_the_kernels_have_the_gradients_of_those_without(monkeypatch):
    T, K, E, M, width = 50, 2, 4, 24, 10
    chosen = torch.rand(T, E, generator=torch.Generator().manual_seed(0)).argsort(-1)[:, :K]
    leaves = [drawn(T, M), drawn(T, K).sigmoid(), drawn(E, M, 2 * width), drawn(E, width, M)]
    found = []
    for on_kernels in (True, False):
        monkeypatch.setattr(experts, "on_kernels", lambda x, on=on_kernels: on)
        x, *others = own = [leaf.clone().requires_grad_() for leaf in leaves]
        out = experts.routed_experts(x, chosen, *others)
        found.append([out, *torch.autograd.grad(out.square().sum(), own)])
    for name, a, b in zip(("out", "x", "weights", "gate_up", "down"), *found, strict=True):
        assert_close(name, a, b, rms=1e-5)
