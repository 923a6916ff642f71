"""Routed experts and rotary positions on a GPU, in bf16: the kernels, the grouped products, their gradients."""

import pytest
import torch

from nsa_train.bench.timing import relative_error
from nsa_train.ops import experts
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
