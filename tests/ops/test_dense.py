"""Dense attention equals a masked softmax over all pairs of tokens."""

import pytest
import torch
from helpers import assert_close

from nsa_train.ops.dense import dense_attention, places


def masked_softmax(q, k, v, lengths, scale, window):
    G = q.shape[1] // k.shape[1]
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    t = torch.arange(len(q))
    visible = (document[:, None] == document) & (t <= t[:, None])
    if window is not None:
        visible &= t[:, None] - t < window
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(G, 1)) * scale
    p = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", p, v.repeat_interleave(G, 1))


@pytest.mark.parametrize("lengths", [(1,), (17,), (9, 1, 6, 5, 14)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)
def test_dense_attention_is_a_masked_softmax(lengths, window, heads):
    generator = torch.Generator().manual_seed(0)
    Hq, Hk, D, Dv, T = *heads, 8, 6, sum(lengths)
    q, k, v = (
        torch.randn(T, h, d, generator=generator, dtype=torch.float64).requires_grad_()
        for h, d in ((Hq, D), (Hk, D), (Hk, Dv))
    )
    got, want = (f(q, k, v, lengths, 8**-0.5, window) for f in (dense_attention, masked_softmax))
    assert torch.equal(dense_attention(q, k, v, lengths, None, window), got)
    assert_close("o", got, want, rms=1e-12)
    into = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    got_gradients = torch.autograd.grad(got, (q, k, v), into, materialize_grads=True)  # one token: only v is used
    for g, w in zip(got_gradients, torch.autograd.grad(want, (q, k, v), into), strict=True):
        torch.testing.assert_close(g, w)


def test_documents_do_not_reach_each_other():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(20, 2, 4, generator=generator) for _ in range(3))
    before = dense_attention(q, k, v, (8, 12), window=5)
    for x in (q, k, v):
        x[:8] = torch.nan
    assert torch.equal(dense_attention(q, k, v, (8, 12), window=5)[8:], before[8:])


def test_padded_documents_of_one_length_stand_together_and_every_token_is_found_again():
    lengths, multiple = (9, 4, 1, 8, 3, 16), 4
    at = places(lengths, multiple, torch.device("cpu"))
    assert at.groups == ((3, 4), (1, 8), (1, 12), (1, 16))
    assert torch.equal(at.token[at.row], torch.arange(sum(lengths)))
    assert at.real.sum() == sum(lengths)
    assert at.real[at.row].all()
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    first = 0
    for documents, length in at.groups:
        for own in at.token[first : first + documents * length].view(documents, length):
            assert len(document[own].unique()) == 1
            n = lengths[int(document[own[0]])]
            assert torch.equal(own[:n], own[0] + torch.arange(n))
        first += documents * length
    assert first == len(at.token)
    assert places((8, 8, 8), 4, torch.device("cpu")) is None


def test_padding_changes_nothing(monkeypatch):
    """As cuDNN sees documents, on the kernels of a CPU."""
    generator = torch.Generator().manual_seed(0)
    lengths = (5, 16, 1, 7, 5)
    q, k, v = (torch.randn(34, h, 4, generator=generator, dtype=torch.float64).requires_grad_() for h in (4, 2, 2))
    want = dense_attention(q, k, v, lengths)
    padded = places(lengths, 8, torch.device("cpu"))
    monkeypatch.setattr("nsa_train.ops.dense.places", lambda *_: padded)
    got = dense_attention(q, k, v, lengths)
    assert_close("o", got, want, rms=1e-12)
    grad = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    for g, w in zip(torch.autograd.grad(got, (q, k, v), grad), torch.autograd.grad(want, (q, k, v), grad), strict=True):
        assert_close("gradient", g, w, rms=1e-12)


def test_other_documents_are_no_reason_to_compile_again():
    torch._dynamo.reset()
    attend = torch.compile(lambda q, k, v, lengths: dense_attention(2 * q, k, v, lengths), backend="eager")
    q, k, v = (torch.randn(20, 2, 4) for _ in range(3))
    got = attend(q, k, v, (8, 12))
    assert torch.equal(got, dense_attention(2 * q, k, v, (8, 12)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        attend(q, k, v, (15, 5))
