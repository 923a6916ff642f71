"""The head's loss, norms and their gradients on a GPU, in bf16."""

import pytest
import torch

from nsa_train.bench.timing import relative_error
from nsa_train.ops import loss, norm

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("unwritten_memory_is_poison")]


def head_case(T, M, V):
    torch.manual_seed(0)
    hidden = torch.randn(T, M, device="cuda", dtype=torch.bfloat16)
    weight = (torch.randn(V, M, device="cuda") * 3 * M**-0.5).bfloat16()
    labels = torch.randint(V, (T,), device="cuda")
    labels[1::3] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.parametrize(("T", "M", "V"), [(1, 64, 50), (777, 384, 16384), (300, 136, 4099), (64, 256, 129280)])
def test_losses_and_gradients_are_those_of_fp64_and_the_same_twice(T, M, V):
    """Chunks of 100 tokens. A token's loss is as exact as logits in bf16 allow."""
    *leaves, labels = head_case(T, M, V)
    labels[0] = 3
    prior = torch.randn(V, device="cuda") * 3
    exact = [x.detach().double().requires_grad_() for x in leaves]
    into = torch.randn(T, device="cuda")
    found = []
    for losses, own in (
        (loss.chunked_token_losses(*leaves, labels, 100, prior), leaves),
        (loss.token_losses(*exact, labels, prior.bfloat16()), exact),
        (loss.chunked_token_losses(*leaves, labels, 100, prior), leaves),
    ):
        found.append([losses, *torch.autograd.grad(losses, own, into.to(losses.dtype))])
    assert found[0][0].dtype == torch.float32
    for name, got, want, again in zip(("losses", "hidden", "weight"), *found, strict=True):
        assert got.isfinite().all(), name
        assert relative_error(got, want) < 2e-2, name
        assert torch.equal(got, again), name


def test_a_token_without_label_costs_nothing_and_a_nan_loss_reaches_every_gradient():
    *leaves, labels = head_case(500, 128, 3000)
    losses = loss.chunked_token_losses(*leaves, labels, 128)
    without = labels == -100
    assert not losses[without].any()
    d_hidden, _ = torch.autograd.grad(losses.sum(), leaves, retain_graph=True)
    assert not d_hidden[without].any()
    d_hidden, d_weight = torch.autograd.grad(losses.sum() * torch.nan, leaves)
    assert d_hidden[~without].isnan().all()
    assert d_weight.isnan().all()


def test_chunks_add_up_in_fp32():
    """512 chunks of one token add the same: a sum in bf16 would stop at 256."""
    hidden = torch.ones(512, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.zeros(2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    losses = loss.chunked_token_losses(hidden, weight, torch.zeros(512, dtype=torch.int64, device="cuda"), 1)
    (gradient,) = torch.autograd.grad(losses.sum(), weight)
    assert (gradient == torch.tensor([[-256.0], [256.0]], device="cuda")).all()


def test_the_backward_pass_needs_a_chunk_of_logits_and_the_sum_of_the_weights_gradient():
    T, M, V, chunk = 8192, 128, 32768, 1024
    *leaves, labels = head_case(T, M, V)
    loss.chunked_token_losses(*leaves, labels, chunk).sum().backward()
    leaves[0].grad = leaves[1].grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss.chunked_token_losses(*leaves, labels, chunk).sum().backward()
    needed = torch.cuda.max_memory_allocated() - before
    assert needed < 1.1 * (2 * chunk * V + 2 * T * M + 6 * V * M) + 2**25  # cuBLAS may take its workspace each time


@pytest.mark.parametrize(("R", "M"), [(1, 384), (5000, 384), (777, 1536), (300, 2561), (40, 8192), (20, 8193), (0, 64)])
def test_norms_and_gradients_are_those_of_fp64_and_the_same_twice(R, M):
    torch.manual_seed(0)
    shapes = ((R, M), (R, M), (M,), (R, M), (R, M))
    x, y, weight, d_total, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    found = []
    for dtype in (torch.bfloat16, torch.float64, torch.bfloat16):  # fp64 takes the plain form
        own = [leaf.to(dtype).requires_grad_() for leaf in (x, y, weight)]
        total, out = norm.sum_and_norm(*own, 1e-6)
        gradients = torch.autograd.grad((total, out), own, (d_total.to(dtype), grad.to(dtype)))
        alone = norm.rms_norm(own[0], own[2], 1e-6)
        found.append([total, out, *gradients, alone, *torch.autograd.grad(alone, own[::2], grad.to(dtype))])
    for i, (got, want, again) in enumerate(zip(*found, strict=True)):
        assert got.dtype == torch.bfloat16
        assert got.isfinite().all(), i
        assert not want.any() or relative_error(got, want) < 1e-2, i
        assert torch.equal(got, again), i


def test_the_norm_of_a_sum_has_the_bits_of_pytorchs():
    torch.manual_seed(0)
    x, y, weight = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((999, 384), (999, 384), (384,))
    )
    total, out = norm.sum_and_norm(x, y, weight, 1e-6)
    want = torch.nn.functional.rms_norm(x + y, (384,), weight, 1e-6)
    assert torch.equal(total, x + y)
    assert (out == want).float().mean() > 0.999  # sums of squares in another order may round another way
