"""Routing, routed experts and rotary positions on a GPU, in bf16: kernels, products, their gradients."""

import pytest
import torch

from nsa_train.bench.timing import relative_error
from nsa_train.ops import experts, routing
from nsa_train.ops.rope import rotate

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("unwritten_memory_is_poison")]


@pytest.mark.parametrize(
    ("T", "E", "K", "M", "width"), [(1, 4, 2, 384, 192), (777, 32, 6, 384, 192), (300, 8, 3, 136, 40)]
)
def test_outputs_and_gradients_are_those_of_fp64(T, E, K, M, width):
    """Some experts have no token."""
    torch.manual_seed(0)
    chosen = torch.rand(T, E - 1, device="cuda").argsort(-1)[:, :K]
    shapes = {"x": (T, M), "gate_up": (E, M, 2 * width), "down": (E, width, M)}
    leaves = {name: torch.randn(size, device="cuda", dtype=torch.bfloat16) for name, size in shapes.items()}
    leaves = {name: (x * x.shape[-2] ** -0.5 if name != "x" else x).requires_grad_() for name, x in leaves.items()}
    leaves["weights"] = torch.rand(T, K, device="cuda").requires_grad_()
    grad = torch.randn(T, M, device="cuda", dtype=torch.bfloat16)
    freed = [torch.full((E, M, 2 * width), torch.nan, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    del freed  # weights' gradients come to lie there, and those of experts without tokens must still be zeros
    exact = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    found = []
    for own in (leaves, exact, leaves):
        out = experts.routed_experts(own["x"], chosen, own["weights"], own["gate_up"], own["down"])
        found.append([out, *torch.autograd.grad(out, list(own.values()), grad.to(out.dtype))])
    for name, got, want, again in zip(("out", *leaves), *found, strict=True):
        assert got.isfinite().all(), name
        assert relative_error(got, want) < 1e-2, name
        assert torch.equal(got, again), name


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(
    ("T", "E", "K", "M"), [(1, 4, 2, 384), (777, 32, 6, 384), (5000, 72, 6, 136), (300, 256, 16, 64)]
)
def test_routing_is_that_of_the_plain_form_in_fp32(monkeypatch, T, E, K, M, softmax):
    torch.manual_seed(0)
    x, weight = torch.randn(T, M, device="cuda").bfloat16(), (torch.randn(E, M, device="cuda") * M**-0.5).bfloat16()
    bias = 0.1 * torch.randn(E, device="cuda")
    cu_seqlens = torch.tensor([0, T // 3, T // 2, T, T], dtype=torch.int32, device="cuda")
    into = torch.randn(T, K, device="cuda")
    found = []
    for on_kernels in (True, False, True):
        monkeypatch.setattr(routing, "on_kernels", lambda x, on=on_kernels: on)
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        logits = routing.router_logits(*leaves)
        chosen, weights, load, balance = routing.route(logits, bias, cu_seqlens, K, softmax, True, 2.5)
        gradients = torch.autograd.grad((weights * into).sum() + 0.1 * balance, leaves)
        found.append((logits, weights, load, balance, *gradients, chosen))
    *got, chosen = found[0]
    *want, wanted = found[1]
    assert (chosen != wanted).any(-1).float().mean() < 2e-3  # scores that differ in the last bit change places
    same = (chosen == wanted).all(-1)
    assert relative_error(got[1][same], want[1][same]) < 1e-5
    for name, a, b, most in zip(("logits", "load", "balance", "x", "weight"), got[:1] + got[2:], want[:1] + want[2:],
                                (1e-5, 1e-3, 1e-4, 1e-2, 1e-2), strict=True):  # fmt: skip
        assert relative_error(a, b) < most, name
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))


def test_experts_have_a_number_whatever_the_logits():
    logits = torch.full((100, 72), torch.nan, device="cuda")
    cu_seqlens = torch.tensor([0, 100], dtype=torch.int32, device="cuda")
    for softmax in (False, True):
        chosen = routing.route(logits, torch.zeros(72, device="cuda"), cu_seqlens, 6, softmax, True, 1.0)[0]
        assert 0 <= chosen.min() <= chosen.max() < 72


@pytest.mark.parametrize("shape", [(777, 16, 64), (300, 4, 192)])
def test_rotation_and_its_gradient_are_those_of_the_plain_form(shape):
    torch.manual_seed(0)
    x, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    angle = torch.randn(shape[0], shape[2] // 2, device="cuda")
    found = []
    for own in (x.requires_grad_(), x.detach().double().requires_grad_()):  # fp64 takes the plain form
        out = rotate(own, angle.cos(), angle.sin())
        found.append([out, *torch.autograd.grad(out, own, grad.to(out.dtype))])
    for got, want in zip(*found, strict=True):
        assert relative_error(got, want) < 5e-3
