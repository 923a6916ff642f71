"""The gated sum against `reference.gated_sum`, and what its backward hands to the branches."""

import pytest
import torch
from helpers import assert_close

from nsa_train.ops import combine
from nsa_train.ops.reference import gated_sum

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(T, Hq, Dv, seed=0):
    """do, gates, 3 outputs, 3 lses."""
    generator = torch.Generator().manual_seed(seed)
    do, *outputs = (torch.randn(T, Hq, Dv, generator=generator).to(DEVICE) for _ in range(4))
    gates = torch.rand(T, Hq, 3, generator=generator).to(DEVICE)
    lses = [torch.randn(T, Hq, generator=generator).to(DEVICE) for _ in range(3)]
    return do, gates, outputs, lses


@pytest.mark.parametrize(("T", "Hq", "Dv"), [(1, 1, 1), (37, 3, 128), (50, 4, 48), (5, 2, 5)])
def test_sum_and_gradients_are_those_of_the_reference(T, Hq, Dv):
    do, gates, outputs, lses = case(T, Hq, Dv)
    assert_close("out", combine.forward(gates, *outputs), gated_sum(gates, outputs), rms=1e-6)
    wanted = gates.clone().requires_grad_()
    (gated_sum(wanted, outputs) * do).sum().backward()
    dgates, delta, lse_gated = combine.backward(do, gates, tuple(outputs), tuple(lses))
    assert_close("dgates", dgates, wanted.grad, rms=1e-6)
    assert_close("delta", delta, wanted.grad.permute(2, 0, 1), rms=1e-6)
    assert_close("lse_gated", lse_gated, torch.stack(lses) - gates.permute(2, 0, 1).log2(), rms=1e-6)


def test_nothing_visible_and_a_gate_of_zero_give_infinity_and_a_finite_gate_gradient():
    do, gates, outputs, lses = case(9, 2, 6)
    gates[2, :, 0], gates[4, 1, 2] = 0, 0
    lses[1][3] = torch.inf
    outputs[1][3] = 0
    dgates, delta, lse_gated = combine.backward(do, gates, tuple(outputs), tuple(lses))
    want = torch.zeros(3, 9, 2, dtype=torch.bool, device=DEVICE)
    want[0, 2], want[2, 4, 1], want[1, 3] = True, True, True
    assert torch.equal(lse_gated == torch.inf, want)
    assert torch.isfinite(lse_gated[~want]).all()
    assert_close("dgates", dgates, torch.stack([(do * o).sum(-1) for o in outputs], -1), rms=1e-6)
    assert torch.equal(delta, dgates.permute(2, 0, 1))


def test_two_runs_give_the_same_bits():
    do, gates, outputs, lses = case(33, 3, 20)
    first, second = (combine.backward(do, gates, tuple(outputs), tuple(lses)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(combine.forward(gates, *outputs), combine.forward(gates, *outputs))
