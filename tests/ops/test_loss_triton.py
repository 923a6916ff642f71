"""The kernels of the loss against their forms in PyTorch, in Triton's interpreter."""

import pytest
import torch
from helpers import assert_close

from nsa_train.ops import loss, loss_triton

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_poison")


def drawn(T, V):
    generator = torch.Generator().manual_seed(0)
    logits, labels = 20 * torch.randn(T, V, generator=generator), torch.randint(V, (T,), generator=generator)
    labels[1::3] = -100
    return logits, labels, torch.randn(T, generator=generator)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("V", [1, 7, 64, loss_triton.COLUMNS, 2 * loss_triton.COLUMNS + 9])
def test_losses_and_gradients_of_rows(T, V):
    logits, labels, grad = drawn(T, V)
    wanted_losses, wanted_lse = loss.row_losses(logits, labels)
    losses, lse = loss_triton.row_losses(logits, labels)
    assert_close("lse", lse, wanted_lse, rms=1e-6)
    want = loss.row_gradients(logits, labels, wanted_lse, grad)
    got = loss_triton.row_gradients(logits.clone(), labels, lse, grad)
    if V > 1:  # else all are zero
        assert_close("losses", losses, wanted_losses, rms=1e-6)
        assert_close("gradient", got, want, rms=1e-5)
    assert losses[1::3].tolist() == [0.0] * len(losses[1::3])
    assert not got[1::3].any()


def test_bf16_logits_become_their_gradient_and_losses_are_fp32():
    logits, labels, grad = drawn(5, 70)
    logits = logits.bfloat16()
    losses, lse = loss_triton.row_losses(logits, labels)
    assert_close("losses", losses, loss.row_losses(logits, labels)[0], rms=1e-6)
    want = loss.row_gradients(logits, labels, lse, grad)
    got = loss_triton.row_gradients(logits, labels, lse, grad)
    assert got is logits
    assert_close("gradient", got, want, rms=1e-2)  # the interpreter cuts off what bf16 does not hold


def test_no_tokens_have_no_losses():
    logits, labels = torch.empty(0, 9), torch.empty(0, dtype=torch.int64)
    losses, lse = loss_triton.row_losses(logits, labels)
    assert losses.shape == lse.shape == (0,)
    assert loss_triton.row_gradients(logits, labels, lse, losses).shape == (0, 9)


def test_a_label_that_is_no_column_makes_the_loss_nan():
    losses, _ = loss_triton.row_losses(torch.zeros(4, 9), torch.tensor([9, -1, 8, -100]))
    assert losses.isnan().tolist() == [True, True, False, False]


@pytest.mark.parametrize("poison", [None, "hidden", "gradient"])
@pytest.mark.parametrize("chunk", [3, 8])
def test_chunked_losses_on_the_kernels_are_the_plain_ones(monkeypatch, chunk, poison):
    """NaN at tokens with and without a label too."""
    T, M, V = 8, 6, 11
    generator = torch.Generator().manual_seed(0)
    hidden, weight, into = (torch.randn(s, generator=generator) for s in ((T, M), (V, M), (T,)))
    labels = torch.tensor([1, -100, 10, 0, -100, -100, 3, 3])
    if poison:
        (hidden if poison == "hidden" else into)[3:5] = torch.nan
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    want = loss.token_losses(*leaves, labels)
    monkeypatch.setattr(loss, "on_kernels", lambda x: True)
    got = loss.chunked_token_losses(*leaves, labels, chunk)
    got, want = ([losses, *torch.autograd.grad(losses, leaves, into)] for losses in (got, want))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_gradient_that_is_one_number_for_all_tokens_is_taken(monkeypatch):
    """That of a sum has no memory of its own for each token."""
    hidden, weight, labels = torch.randn(8, 6), torch.randn(11, 6).requires_grad_(), torch.arange(8)
    (want,) = torch.autograd.grad(loss.token_losses(hidden, weight, labels).sum() * 3, weight)
    monkeypatch.setattr(loss, "on_kernels", lambda x: True)
    (got,) = torch.autograd.grad(loss.chunked_token_losses(hidden, weight, labels, 3).sum() * 3, weight)
    assert_close("weight", got, want, rms=1e-5)
