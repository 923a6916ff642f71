"""Cross-entropy in chunks equals cross-entropy of all logits at once."""

import pytest
import torch
from helpers import assert_close

from nsa_train.ops.loss import chunked_token_losses, token_losses

T, M, V = 13, 6, 11


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    shapes = ((T, M), (V, M))
    hidden, weight = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    labels = torch.randint(V, (T,), generator=generator)
    labels[[0, 5, 12]] = -100
    return hidden, weight, labels


def test_a_tokens_loss_is_minus_its_log_probability(case):
    hidden, weight, labels = case
    logits = (hidden @ weight.T).detach()
    want = [0.0 if y == -100 else float(logits[t].logsumexp(0) - logits[t, y]) for t, y in enumerate(labels.tolist())]
    assert_close("loss", token_losses(*case), torch.tensor(want, dtype=torch.float64), rms=1e-12)


@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 100])
def test_chunks_give_the_plain_losses_and_gradients(case, chunk):
    into = torch.rand(T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got, want = chunked_token_losses(*case, chunk), token_losses(*case)
    assert_close("loss", got, want, rms=1e-14)
    got_gradients = torch.autograd.grad(got, case[:2], into)
    for name, g, w in zip(("hidden", "weight"), got_gradients, torch.autograd.grad(want, case[:2], into), strict=True):
        assert_close(name, g, w, rms=1e-13)


def test_a_token_without_label_costs_nothing_and_gets_no_gradient(case):
    hidden, _, labels = case
    losses = chunked_token_losses(*case, 4)
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    without = labels == -100
    assert not losses[without].any()
    assert not gradient[without].any()
    assert losses[~without].min() > 0


def test_losses_of_bf16_are_fp32(case):
    hidden, weight, labels = case
    assert chunked_token_losses(hidden.bfloat16(), weight.bfloat16(), labels, 4).dtype == torch.float32
