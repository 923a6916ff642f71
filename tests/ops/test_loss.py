"""Cross-entropy in chunks equals cross-entropy of all logits at once."""

import weakref

import pytest
import torch
from helpers import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    for prior in (None, torch.randn(V, dtype=torch.float64)):
        added = logits if prior is None else logits + prior
        want = [0.0 if y == -100 else float(x.logsumexp(0) - x[y]) for x, y in zip(added, labels.tolist(), strict=True)]
        assert_close("loss", token_losses(*case, prior), torch.tensor(want, dtype=torch.float64), rms=1e-12)


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 100])
def test_chunks_give_the_plain_losses_and_gradients(case, chunk, with_prior):
    prior = torch.linspace(-3, 3, V, dtype=torch.float64) if with_prior else None
    into = torch.rand(T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got, want = chunked_token_losses(*case, chunk, prior), token_losses(*case, prior)
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


@pytest.mark.parametrize("poison", ["hidden", "gradient"])
def test_a_nan_goes_where_it_goes_in_the_plain_form(case, poison):
    """Of tokens with a label and of those without; a loss that is multiplied by NaN makes every gradient NaN."""
    hidden, _, labels = case
    into = torch.ones(T, dtype=torch.float64)
    (hidden.data if poison == "hidden" else into)[4:6] = torch.nan
    got, want = chunked_token_losses(*case, 4), token_losses(*case)
    assert torch.equal(got.isnan(), want.isnan())
    for g, w in zip(*(torch.autograd.grad(losses, case[:2], into) for losses in (got, want)), strict=True):
        assert torch.equal(g.isnan(), w.isnan())
    gradients = torch.autograd.grad(chunked_token_losses(*case, 4).sum() * torch.nan, case[:2])
    assert gradients[1].isnan().all()
    assert gradients[0][labels != -100].isnan().all()


def test_many_chunks_lose_no_bits_of_a_bf16_weights_gradient():
    """Each of the 512 chunks adds the same; a sum in bf16 stops at 256 times a chunk's."""
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    losses = chunked_token_losses(hidden, weight, torch.zeros(512, dtype=torch.int64), 1)
    (gradient,) = torch.autograd.grad(losses.sum(), weight)
    assert gradient.tolist() == [[-256.0], [256.0]]


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at once."""

    def __init__(self):
        super().__init__()
        self.made, self.peak = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.made = [ref for ref in self.made if ref() is not None]
        self.made += [weakref.ref(x) for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        storages = [x.untyped_storage() for ref in self.made if (x := ref()) is not None]
        self.peak = max(self.peak, sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))
        return out


def test_memory_grows_with_tokens_not_with_tokens_times_vocabulary():
    V, chunk, peaks, kept = 1000, 8, [], []

    def note(x):
        kept.append(x)
        return x

    for tokens in (2 * chunk, 10 * chunk):
        hidden, weight = torch.randn(tokens, M, requires_grad=True), torch.randn(V, M, requires_grad=True)
        labels = torch.randint(V, (tokens,))
        with PeakBytes() as bytes_, torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            chunked_token_losses(hidden, weight, labels, chunk).sum().backward()
        peaks.append(bytes_.peak)
    assert peaks[0] > chunk * V * 4
    assert peaks[1] - peaks[0] < 8 * chunk * V / 4
    assert max(x.numel() for x in kept) == V * M
    kept.clear()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        chunked_token_losses(hidden, weight, labels, chunk)
    assert kept == []


def test_it_compiles_as_one_graph(case):
    compiled = torch.compile(chunked_token_losses, fullgraph=True, backend="aot_eager")
    got, want = compiled(*case, 5), token_losses(*case)
    assert_close("loss", got, want, rms=1e-14)
    gradients = (torch.autograd.grad(losses.sum(), case[:2]) for losses in (got, want))
    for name, g, w in zip(("hidden", "weight"), *gradients, strict=True):
        assert_close(name, g, w, rms=1e-13)
