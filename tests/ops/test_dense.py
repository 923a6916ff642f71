"""Dense attention equals a masked softmax over all pairs of tokens."""

import pytest
import torch
from helpers import assert_close

from nsa_train.ops.dense import dense_attention


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
