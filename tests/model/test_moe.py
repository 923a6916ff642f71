"""The mixture of experts: shared experts for every token, routed ones by their weights."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from cases import LENGTHS, MOE
from helpers import assert_close

from nsa_train.model.moe import MoE
from nsa_train.packing import Packing

M, T = 32, sum(LENGTHS)
CU_SEQLENS = Packing.from_lengths(LENGTHS).cu_seqlens


def moe(**fields):
    made = MoE(M, dataclasses.replace(MOE, **fields))
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3, generator=generator)
    return made, torch.randn(T, M, generator=generator)


def expert(x, gate_up, down):
    gate, up = (x @ gate_up).chunk(2, -1)
    return (F.silu(gate) * up) @ down


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_output_is_shared_experts_plus_weighted_routed_ones(shared):
    made, x = moe(shared=shared)
    routing = made.router(x, CU_SEQLENS)
    want = torch.zeros_like(x)
    for t in range(T):
        for weight, e in zip(routing.weights[t], routing.experts[t].tolist(), strict=True):
            want[t] += (weight * expert(x[t], made.gate_up[e], made.down[e])).detach()
    if shared:
        want += expert(x, made.shared.gate_up.weight.T, made.shared.down.weight.T).detach()
    assert_close("out", made(x, routing), want, rms=1e-5)


def test_shared_experts_are_as_wide_as_their_number():
    assert moe(shared=3)[0].shared.down.weight.shape == (M, 3 * MOE.expert_width)
    assert moe(shared=0)[0].shared is None


def test_without_routed_weight_only_shared_experts_speak():
    made, x = moe()
    routing = made.router(x, CU_SEQLENS)
    silent = routing._replace(weights=torch.zeros_like(routing.weights))
    assert torch.equal(made(x, silent), made.shared(x))


def test_the_router_learns_through_the_weights():
    made, x = moe()
    made(x, made.router(x, CU_SEQLENS)).square().sum().backward()
    assert made.router.weight.grad.abs().amax(1).min() > 0
