"""Compressed attention in Triton equals the masked softmax of the reference, forward and backward."""

import pytest
import torch
from helpers import assert_close, slices

from nsa_train.ops import compressed
from nsa_train.ops.documents import Documents
from nsa_train.ops.nsa import NSASpec
from nsa_train.ops.reference import attend, cmp_visible, compressed_length
from nsa_train.ops.tiles import LOG2E
from nsa_train.packing import Packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPEC = NSASpec(cmp_block=4, cmp_stride=2, slc_block=4, slc_count=3, slc_init=1, slc_local=1)
SPARE = 2  # rows of NaN behind the last key


def inputs(lengths, spec=SPEC, Hq=4, Hk=2, D=16, Dv=16, empty=0, spare=SPARE, seed=0):
    """Random q, k, v, do, gates (0 to 1) and the documents; `spare` rows of NaN lie behind the last key."""
    generator = torch.Generator().manual_seed(seed)
    T, C = sum(lengths), sum(compressed_length(n, spec) for n in lengths)
    shapes = {"q": (T, Hq, D), "k": (C, Hk, D), "v": (C, Hk, Dv), "do": (T, Hq, Dv), "gates": (T, Hq)}
    x = {name: torch.randn(shape, generator=generator).to(DEVICE) for name, shape in shapes.items()}
    x["gates"] = x["gates"].sigmoid()
    for name in ("k", "v"):
        x[name] = torch.cat([x[name], torch.full((spare, *x[name].shape[1:]), torch.nan, device=DEVICE)])
    cu_seqlens = Packing.from_lengths(lengths, len(lengths) + empty).to(DEVICE).cu_seqlens
    return x, Documents(cu_seqlens, T, spec)


def expected(x, lengths, spec, scale):
    """The reference's o, lse and gradients of <gate o, do> with respect to q, k, v; zeros behind the last key."""
    q, k, v = (x[name].detach().clone().requires_grad_() for name in "qkv")
    parts, lses = [], []
    for tokens, rows in slices(lengths, spec):
        L = tokens.stop - tokens.start
        visible = cmp_visible(L, spec, q.device)
        parts.append(attend(q[tokens], k[rows], v[rows], visible, scale)[0])
        G = q.shape[1] // k.shape[1]
        s = torch.einsum("thd,chd->thc", q[tokens], k[rows].repeat_interleave(G, 1)) * scale
        s = s.masked_fill(~visible[:, None], -torch.inf)
        lses.append(torch.where(visible.any(-1)[:, None], torch.logsumexp(s, -1) * LOG2E, torch.inf))
    o = torch.cat(parts)
    grads = torch.autograd.grad((o * x["gates"][..., None] * x["do"]).sum(), (q, k, v))
    return [y.detach() for y in (o, torch.cat(lses), *(g.nan_to_num(0.0) for g in grads))]


def backward_arguments(x, o, lse):
    """do, lse' = lse - log2 g, delta = <do, o>, as the whole op hands them to its branches."""
    return x["do"], lse - x["gates"].log2(), (x["do"] * o).sum(-1)


def run(x, documents, spec=SPEC, scale=0.3, dq=None):
    """o, lse, dq, dk, dv; dq starts as NaN, or is added to."""
    o, lse = compressed.forward(x["q"], x["k"], x["v"], documents, spec, scale)
    target = torch.full_like(x["q"], torch.nan) if dq is None else dq
    dk, dv = compressed.backward(
        x["q"], x["k"], x["v"], *backward_arguments(x, o, lse), documents, spec, scale, target, dq is not None
    )
    return o, lse, target, dk, dv


def check(got, want):
    seen = want[1].isfinite()
    assert torch.equal(got[1] == torch.inf, ~seen)
    assert_close("lse", got[1][seen], want[1][seen], 1e-5)
    for name, i in (("o", 0), ("dq", 2), ("dk", 3), ("dv", 4)):
        assert_close(name, got[i], want[i], 1e-5)
    for name, x in (("o", got[0][~seen]), ("dq", got[2][~seen]), ("dk", got[3][-SPARE:]), ("dv", got[4][-SPARE:])):
        assert (x == 0).all(), f"{name}: zeros where nothing is seen, and in the {SPARE} rows behind the last key"


@pytest.fixture(autouse=True)
def no_memory_is_clean(monkeypatch):
    """Fresh memory holds NaN, so that reading what nobody wrote shows."""
    empty = torch.empty

    def filled(*size, **kwargs):
        x = empty(*size, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(-(2**20))

    monkeypatch.setattr(torch, "empty", filled)


@pytest.mark.parametrize(
    ("lengths", "empty"), [([1, 3, 4, 5, 9], 0), ([63, 3, 65], 2), ([64, 1, 70], 1), ([7] * 9, 0), ([300], 0)], ids=str
)
def test_outputs_and_gradients_equal_the_reference(lengths, empty):
    x, documents = inputs(lengths, empty=empty)
    check(run(x, documents), expected(x, lengths, SPEC, 0.3))


@pytest.mark.parametrize(
    ("heads", "widths"),
    [((3, 1), (20, 9)), ((1, 1), (33, 17)), ((2, 2), (3, 1)), ((16, 1), (48, 16)), ((10, 2), (24, 40))],
    ids=str,
)
def test_any_group_size_and_any_width(heads, widths):
    lengths = [37, 3, 66]
    x, documents = inputs(lengths, Hq=heads[0], Hk=heads[1], D=widths[0], Dv=widths[1])
    check(run(x, documents), expected(x, lengths, SPEC, 0.3))


@pytest.mark.parametrize(
    "spec", [NSASpec(1, 1, 1), NSASpec(5, 5, 10), NSASpec(9, 3, 6), NSASpec(32, 16, 64), NSASpec(3, 1, 2)], ids=str
)
def test_any_legal_spec(spec):
    lengths = [spec.cmp_block - 1, spec.cmp_block, 70, spec.cmp_block + 1]
    lengths = [n for n in lengths if n]
    x, documents = inputs(lengths, spec)
    check(run(x, documents, spec), expected(x, lengths, spec, 0.3))


def test_the_sums_of_several_chunks_of_queries_are_the_whole_gradient(monkeypatch):
    monkeypatch.setattr(compressed, "SMALLEST_CHUNK", 16)
    monkeypatch.setattr(compressed, "CHUNKS", 8)
    lengths = [150, 40, 10]
    x, documents = inputs(lengths, Hq=16, Hk=1)
    assert compressed.query_chunk(200) == 32
    check(run(x, documents), expected(x, lengths, SPEC, 0.3))


def test_dq_is_added_to_what_is_there():
    x, documents = inputs([20, 9])
    before = torch.randn_like(x["q"])
    want = before + run(x, documents)[2]
    assert_close("dq", run(x, documents, dq=before.clone())[2], want, 1e-6)


def test_a_closed_gate_gives_no_gradient():
    x, documents = inputs([40])
    x["gates"][10:20] = 0
    got = run(x, documents)
    want = expected(x, [40], SPEC, 0.3)
    check(got, want)
    assert (got[2][10:20] == 0).all()


def test_documents_without_a_compressed_key_give_zeros():
    x, documents = inputs([3, 1, 2], spare=0)
    assert len(x["k"]) == 0
    o, lse, dq, dk, dv = run(x, documents)
    assert (o == 0).all()
    assert (dq == 0).all()
    assert (lse == torch.inf).all()
    assert len(dk) == len(dv) == 0


def test_packed_documents_give_the_bits_of_separate_ones():
    lengths = [70, 9, 33]
    x, documents = inputs(lengths)
    together = run(x, documents)
    for tokens, rows in slices(lengths, SPEC):
        own = {name: y[rows if name in "kv" else tokens] for name, y in x.items()}
        L = tokens.stop - tokens.start
        got = run(own, Documents(torch.tensor([0, L], dtype=torch.int32, device=DEVICE), L, SPEC))
        for i, part in enumerate((tokens, tokens, tokens, rows, rows)):
            assert torch.equal(got[i], together[i][part])


def test_no_token_depends_on_a_later_key_or_on_another_document():
    lengths = [20, 90]
    x, documents = inputs(lengths)
    before = run(x, documents)
    C, t = compressed_length(20, SPEC), 20 + 60
    c = C + (60 - SPEC.cmp_block) // SPEC.cmp_stride + 1  # first key that position 60 does not see
    for name in "kv":
        x[name][c:] = torch.randn_like(x[name][c:])  # later keys, and the NaN behind the last one
        x[name][:C] = torch.randn_like(x[name][:C])
    after = run(x, documents)
    for i in range(3):
        assert torch.equal(before[i][20 : t + 1], after[i][20 : t + 1])
        assert not torch.equal(before[i][t + 2 :], after[i][t + 2 :])


def test_two_runs_give_the_same_bits():
    x, documents = inputs([63, 3, 65])
    for a, b in zip(run(x, documents), run(x, documents), strict=True):
        assert torch.equal(a, b)
