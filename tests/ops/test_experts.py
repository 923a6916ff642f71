"""Routed experts against a loop over tokens, outputs and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

from nsa_train.ops import experts as experts_module
from nsa_train.ops.experts import matmul_loop, outer_loop, routed_experts

M, E, K, WIDTH = 5, 6, 2, 3


def routing(T, kind, generator):
    """[T, K] experts, all different within a token."""
    if kind == "one":  # every token visits expert 3, and expert 0 besides
        return torch.tensor([[3, 0]]).expand(T, K).contiguous()
    allowed = 4 if kind == "some idle" else E
    return torch.rand(T, allowed, generator=generator).argsort(-1)[:, :K]


def case(T, kind="any", dtype=torch.float64):
    generator = torch.Generator().manual_seed(T)
    shapes = {"x": (T, M), "weights": (T, K), "gate_up": (E, M, 2 * WIDTH), "down": (E, WIDTH, M)}
    drawn = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
    leaves = {k: x.to(dtype).requires_grad_() for k, x in drawn.items()}
    return routing(T, kind, generator), leaves


def by_token(experts, x, weights, gate_up, down):
    rows = []
    for t in range(len(x)):
        total = torch.zeros_like(x[t])
        for weight, e in zip(weights[t], experts[t].tolist(), strict=True):
            gate, up = (x[t] @ gate_up[e]).split(WIDTH)
            total = total + weight * ((F.silu(gate) * up) @ down[e])
        rows.append(total)
    return torch.stack(rows)


def ours(experts, x, weights, gate_up, down):
    return routed_experts(x, experts, weights, gate_up, down)


@pytest.mark.parametrize("T", [1, 2, 17])
@pytest.mark.parametrize("kind", ["any", "some idle", "one"])
def test_routed_experts_equal_a_loop_over_tokens(T, kind):
    experts, leaves = case(T, kind)
    got, want = ours(experts, **leaves), by_token(experts, **leaves)
    assert_close("out", got, want, rms=1e-12)
    into = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(1))
    got_gradients = torch.autograd.grad(got, leaves.values(), into)
    for name, g, w in zip(leaves, got_gradients, torch.autograd.grad(want, leaves.values(), into), strict=True):
        assert_close(name, g, w, rms=1e-12)


def test_an_expert_without_tokens_gets_a_gradient_of_zero():
    experts, leaves = case(17, "some idle")
    for gradient in torch.autograd.grad(ours(experts, **leaves).sum(), [leaves["gate_up"], leaves["down"]]):
        assert not gradient[4:].any()
        assert gradient[:4].abs().amax((1, 2)).min() > 0


def test_gradients_of_routed_experts_are_right():
    experts, leaves = case(4)
    assert torch.autograd.gradcheck(
        lambda *values: ours(experts, **dict(zip(leaves, values, strict=True))), tuple(leaves.values())
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_grouped_kernel_equals_the_loop_over_experts(dtype):
    generator = torch.Generator().manual_seed(0)
    rows, weights, grad = (torch.randn(s, generator=generator).to(dtype) for s in ((40, 16), (E, 16, 8), (40, 8)))
    for counts in ([7, 0, 9, 1, 0, 23], [0, 0, 40, 0, 0, 0]):
        ends = torch.tensor(counts).cumsum(0).to(torch.int32)
        got, want = F.grouped_mm(rows, weights, offs=ends), matmul_loop(rows, weights, ends)
        assert_close("grouped", got, want, rms=1e-2 if dtype == torch.bfloat16 else 1e-6)
        got, want = F.grouped_mm(rows.T, grad, offs=ends), outer_loop(rows, grad, ends)
        assert_close("outer", got, want, rms=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_only_the_first_product_and_tables_are_kept():
    T = 50
    experts, leaves = case(T, dtype=torch.float32)
    own, storages = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}, {}

    def note(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        ours(experts, **leaves)
    kept = sum(storage.nbytes() for at, storage in storages.items() if at not in own)
    assert kept == T * K * (2 * WIDTH * 4 + 2 * 8) + E * 4  # the product; order and places; ends


def test_compiles_into_one_graph(monkeypatch):
    """With the grouped kernel, as on a GPU: the loop over experts asks for their numbers of tokens."""
    grouped = lambda rows, weights, ends: F.grouped_mm(rows, weights, offs=ends)  # noqa: E731
    monkeypatch.setattr(experts_module, "grouped_matmul", grouped)
    monkeypatch.setattr(experts_module, "grouped_outer", lambda rows, grad, ends: grouped(rows.T, grad, ends))
    generator = torch.Generator().manual_seed(0)
    shapes = (17, 8), (E, 8, 16), (E, 8, 8)
    leaves = [torch.randn(size, generator=generator).bfloat16().requires_grad_() for size in shapes]
    leaves.insert(1, torch.rand(17, K, generator=generator).requires_grad_())
    experts, found = routing(17, "some idle", generator), []
    for op in (routed_experts, torch.compile(routed_experts, fullgraph=True, backend="aot_eager")):
        out = op(leaves[0], experts, *leaves[1:])
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for name, want, got in zip(("out", "x", "weights", "gate_up", "down"), *found, strict=True):
        assert_close(name, got, want, rms=1e-2)


def test_two_runs_give_the_same_bits():
    experts, leaves = case(50, dtype=torch.float32)
    runs = []
    for _ in range(2):
        out = ours(experts, **leaves)
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves.values())])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
