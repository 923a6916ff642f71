"""The sliding window kernels against `reference.attend` under `reference.win_visible`, every output and gradient."""

import pytest
import torch

from nsa_train.ops import window
from nsa_train.ops.documents import Documents
from nsa_train.ops.reference import NSASpec, attend, win_visible
from nsa_train.packing import Packing
from tests.helpers import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("o", "lse", "dq", "dk", "dv")


def spec(w):
    return NSASpec(cmp_block=4, cmp_stride=2, slc_block=4, slc_count=3, slc_init=1, slc_local=1, window=w)


def inputs(lengths, Hk=1, G=2, D=8, Dv=6, seed=0):
    """q, k, v, do, gate [T, Hq]."""
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    shapes = (T, Hk * G, D), (T, Hk, D), (T, Hk, Dv), (T, Hk * G, Dv)
    tensors = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
    return (*tensors, torch.rand(T, Hk * G, generator=generator).to(DEVICE) + 0.1)


def expected(lengths, w, q, k, v, do, gate, scale):
    """o, lse and the gradients of sum(do * gate * o) by autograd, document by document, in float64."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    outputs, lses = [], []
    G = q.shape[1] // k.shape[1]
    for one in torch.arange(len(q)).split(lengths):
        seen = win_visible(len(one), w, q.device)
        outputs.append(attend(q[one], k[one], v[one], seen, scale)[0])
        s = torch.einsum("thd,shd->hts", q[one], k[one].repeat_interleave(G, 1)) * scale
        lses.append((s.masked_fill(~seen, -torch.inf).logsumexp(-1) / torch.log(torch.tensor(2.0))).T)
    o = torch.cat(outputs)
    (o * gate[..., None] * do).sum().backward()
    return o, torch.cat(lses), q.grad, k.grad, v.grad


def computed(lengths, w, q, k, v, do, gate, scale, dq=None, empty=0):
    documents = Documents(Packing.from_lengths(lengths, len(lengths) + empty).cu_seqlens.to(DEVICE), len(q), spec(w))
    o, lse = window.forward(q, k, v, documents, spec(w), scale)
    grad_q = torch.full_like(q, torch.nan) if dq is None else dq.clone()
    delta = (do * o).sum(-1)
    dk, dv = window.backward(
        q, k, v, do, lse - gate.log2(), delta, documents, spec(w), scale, grad_q, accumulate=dq is not None
    )
    return o, lse, grad_q, dk, dv


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch):
    """What a kernel does not write must not matter."""

    def filled(make):
        def empty(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return empty

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))


@pytest.mark.parametrize(
    ("lengths", "w", "shape"),
    [
        ([70], 5, {}),  # narrow tiles for everything
        ([1, 16, 17, 40], 16, {}),  # w is one tile, ends beside its edges
        ([45], 21, dict(G=16)),  # 8 tokens a program, older keys behind whole tiles
        ([34, 3], 33, dict(Hk=2, G=3, D=7, Dv=5)),  # odd everything
        ([66, 63, 1], 64, dict(G=1, D=24, Dv=20)),  # two widths of keys, 64 tokens in a tile
        ([20], 100, dict(G=1)),  # wider than the document
        ([9, 4], 1, dict(G=1)),  # a query sees itself only
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_the_reference(lengths, w, shape):
    case = inputs(lengths, **shape)
    scale = 0.3
    for name, got, want in zip(
        NAMES, computed(lengths, w, *case, scale, empty=2), expected(lengths, w, *case, scale), strict=True
    ):
        if w == 1 and name in ("dq", "dk"):
            assert got.abs().max() < 1e-6  # the only probability is 1 whatever the score
        else:
            assert_close(name, got, want, rms=1e-5)


def test_dq_is_added_to_what_is_there():
    lengths, case = [21], inputs([21])
    before = torch.randn_like(case[0])
    alone = computed(lengths, 6, *case, 0.3)
    added = computed(lengths, 6, *case, 0.3, dq=before)
    assert_close("dq", added[2] - before, alone[2], rms=1e-5)


def test_two_runs_give_the_same_bits():
    lengths, case = [19, 8], inputs([19, 8])
    for a, b in zip(computed(lengths, 6, *case, 0.3), computed(lengths, 6, *case, 0.3), strict=True):
        assert torch.equal(a, b)


def test_no_document_reads_another_and_no_query_its_future():
    """NaN in the other documents, and in keys and values of tokens that a query may not see, changes no bit."""
    lengths, w = [18, 21, 17], 6
    q, k, v, do, gate = inputs(lengths)
    whole = computed(lengths, w, q, k, v, do, gate, 0.3)
    poisoned = [x.clone() for x in (q, k, v, do, gate)]
    for x in poisoned:
        x[:18], x[39:] = torch.nan, torch.nan
    for a, b in zip(whole, computed(lengths, w, *poisoned, 0.3), strict=True):
        assert torch.equal(a[18:39], b[18:39])
    future = [x.clone() for x in (k, v)]
    for x in future:
        x[30:39] = 7.0
    o, lse, *_ = computed(lengths, w, q, *future, do, gate, 0.3)
    assert torch.equal(o[18:30], whole[0][18:30])
    assert torch.equal(lse[18:30], whole[1][18:30])


def test_a_gate_of_zero_passes_no_gradient():
    lengths, (q, k, v, do, gate) = [20], inputs([20])
    gate[:] = 0
    for grad in computed(lengths, 6, q, k, v, do, gate, 0.3)[2:]:
        assert torch.equal(grad, torch.zeros_like(grad))
