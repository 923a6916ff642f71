"""Compressed attention in Triton equals the masked softmax of the reference, forward and backward."""

import pytest
import torch
from compressed_cases import DEVICE, SPEC, check, expected, inputs, run
from helpers import assert_close, slices

from nsa_train.ops import compressed
from nsa_train.ops.documents import Documents
from nsa_train.ops.nsa import NSASpec
from nsa_train.ops.reference import compressed_length

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_poison")


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
