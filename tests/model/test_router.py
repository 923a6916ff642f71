"""The router: choice, weights, balance loss and the balancing bias."""

import dataclasses

import pytest
import torch
from cases import LENGTHS, MOE

from nsa_train.model.router import Router, update_bias
from nsa_train.packing import Packing

T, M, E, K = sum(LENGTHS), 32, MOE.experts, MOE.top_k
CU_SEQLENS = Packing.from_lengths(LENGTHS, documents=5).cu_seqlens


def router(**fields):
    made = Router(M, dataclasses.replace(MOE, **fields))
    torch.nn.init.normal_(made.weight, 0, 0.3, generator=torch.Generator().manual_seed(0))
    return made


def tokens():
    return torch.randn(T, M, generator=torch.Generator().manual_seed(1))


def scores_of(made, x):
    logits = x @ made.weight.detach().T
    return logits.sigmoid() if made.config.router == "sigmoid" else logits.softmax(-1)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalise", [True, False])
def test_a_token_visits_its_best_experts_with_their_scores(kind, normalise):
    made, x = router(router=kind, normalise=normalise, routed_scale=2.5), tokens()
    routing, scores = made(x, CU_SEQLENS), scores_of(made, x)
    for t in range(T):
        best = sorted(range(E), key=lambda e: -float(scores[t, e]))[:K]
        assert sorted(routing.experts[t].tolist()) == sorted(best)
        kept = scores[t, routing.experts[t]]
        want = 2.5 * (kept / kept.sum() if normalise else kept)
        torch.testing.assert_close(routing.weights[t].detach(), want)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_the_bias_steers_the_choice_but_not_the_weights(kind):
    made, x = router(router=kind), tokens()
    made.bias[2] = 10.0
    routing, scores = made(x, CU_SEQLENS), scores_of(made, x)
    assert (routing.experts == 2).any(-1).all()
    kept = scores.gather(-1, routing.experts)
    torch.testing.assert_close(routing.weights.detach(), kept / kept.sum(-1, keepdim=True))
    assert routing.load[2] == T


def test_the_bias_does_not_change_the_share_of_scores_in_the_balance_loss():
    made, x = router(), tokens()
    made.bias += 7.0  # the same for all: no other choice
    plain = router()(x, CU_SEQLENS)
    assert torch.equal(made(x, CU_SEQLENS).balance, plain.balance)


def test_load_counts_the_tokens_of_each_expert():
    routing = router()(tokens(), CU_SEQLENS)
    assert routing.load.tolist() == [int((routing.experts == e).sum()) for e in range(E)]
    assert routing.load.sum() == T * K


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_balance_loss_is_counted_document_by_document(kind):
    made, x = router(router=kind), tokens()
    routing, scores = made(x, CU_SEQLENS), scores_of(made, x)
    want, first = 0.0, 0
    for length in LENGTHS:
        for e in range(E):
            visits = sum(e in routing.experts[t].tolist() for t in range(first, first + length))
            share = sum(float(scores[t, e] / scores[t].sum()) for t in range(first, first + length))
            want += (visits * E / (K * length)) * (share / length) * length
        first += length
    assert float(routing.balance.detach()) == pytest.approx(want, rel=1e-5)


def test_balance_loss_of_even_scores_is_the_number_of_tokens():
    made = router()
    torch.nn.init.zeros_(made.weight)
    assert float(made(tokens(), CU_SEQLENS).balance.detach()) == pytest.approx(T, rel=1e-6)


def test_balance_loss_pushes_the_most_visited_expert_down():
    made, x = router(), tokens().abs()
    with torch.no_grad():
        made.weight[1] += 0.2
    routing = made(x, CU_SEQLENS)
    (gradient,) = torch.autograd.grad(routing.balance, made.weight)
    assert routing.load.argmax() == 1
    after = made.weight.detach() - 1e-4 * gradient
    assert (x @ (after - made.weight.detach()).T).mean(0).argmin() == 1


def test_scores_are_fp32_for_bf16_tokens():
    made, x = router(), tokens().bfloat16()
    got, want = made(x, CU_SEQLENS), made(x.float(), CU_SEQLENS)
    assert got.weights.dtype == got.balance.dtype == torch.float32
    assert torch.equal(got.weights, want.weights)
    assert torch.equal(got.experts, want.experts)


def test_update_lowers_overloaded_experts_and_stays_centred():
    bias = torch.zeros(4)
    update_bias(bias, torch.tensor([10.0, 2.0, 2.0, 2.0]), rate=0.1)
    assert bias[0] < 0 < bias[1:].min()
    assert float(bias.sum()) == pytest.approx(0, abs=1e-7)
    torch.testing.assert_close(bias[1] - bias[0], torch.tensor(0.2))


def test_an_even_load_or_a_rate_of_zero_moves_nothing():
    for load, rate in (([3.0] * 4, 0.1), ([9.0, 1.0, 1.0, 1.0], 0.0)):
        bias = torch.tensor([0.3, -0.1, -0.1, -0.1])
        before = bias.clone()
        update_bias(bias, torch.tensor(load), rate)
        torch.testing.assert_close(bias, before)


def test_balancing_evens_out_the_load():
    made, x = router(), tokens()
    made.weight.requires_grad_(False)[0] += 0.05
    made.weight[0] += 0.1 * x.mean(0)
    spread = []
    for _ in range(200):
        load = made(x, CU_SEQLENS).load
        spread.append(float(load.max() - load.min()))
        update_bias(made.bias, load, 0.005)
    assert sum(spread[-20:]) / 20 < 0.5 * spread[0]
    assert float(made.bias.mean()) == pytest.approx(0, abs=1e-6)


def test_the_bias_is_no_parameter():
    made = router()
    assert [name for name, _ in made.named_parameters()] == ["weight"]
    assert "bias" in made.state_dict()
    assert made.bias.dtype == torch.float32


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_a_forced_router_gives_every_expert_as_many_tokens_whatever_its_scores(kind):
    made = router(router=kind)
    made.bias[2] = 10.0
    made.forced = True
    routing = made(tokens(), CU_SEQLENS)
    assert all(len(set(row)) == K for row in routing.experts.tolist())
    assert routing.load.max() - routing.load.min() <= 1
    assert routing.weights.detach().sum(-1).tolist() == pytest.approx([1.0] * T)
