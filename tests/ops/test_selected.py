"""The selected attention kernels against `reference.attend` with `slc_visible`, every output and gradient."""

import pytest
import torch
from helpers import assert_close
from selected_cases import DEVICE, NAMES, computed, expected, inputs, spec, table_of

from nsa_train.ops import selected_plan

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_poison")
CASES = {
    "edges of a block": ([1, 3, 4, 5, 21], spec(), {}),
    "16 heads": ([23], spec(8, 2), {"G": 16}),
    "odd everything": ([26, 5], spec(11, 5, 0, 2), {"Hk": 2, "G": 3, "D": 7, "Dv": 5}),
    "one head, two widths": ([30, 1], spec(8, 3, 0, 1), {"G": 1, "D": 24, "Dv": 20}),
    "blocks of one token": ([9], spec(1, 5, 2, 1), {}),
    "one block only": ([13, 9], spec(4, 1, 0, 1), {}),
    "blocks wider than a tile of keys": ([90], spec(70, 2, 0, 1), {"G": 1}),
    "more heads than rows": ([9], spec(4, 2, 0, 1), {"G": 40}),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_reference(case):
    lengths, sizes, shape = CASES[case]
    tensors = inputs(lengths, sizes, **shape)
    results = computed(lengths, sizes, *tensors, empty=2), expected(lengths, sizes, *tensors)
    for name, got, want in zip(NAMES, *results, strict=True):
        assert_close(name, got, want, rms=1e-5)


def test_lists_longer_than_a_work_item_are_added_up(monkeypatch):
    """Block 0 is read by every token: 3 items of 16 tokens, the last one of 9."""
    monkeypatch.setattr(selected_plan, "ITEM_TOKENS", 16)
    lengths, sizes = [41, 3], spec(8, 3)
    tensors = inputs(lengths, sizes)
    results = computed(lengths, sizes, *tensors), expected(lengths, sizes, *tensors)
    for name, got, want in zip(NAMES, *results, strict=True):
        assert_close(name, got, want, rms=1e-5)


def test_blocks_behind_the_own_one_are_not_visible():
    lengths, sizes = [18], spec(4, 5)
    q, k, v, _, do, gate = inputs(lengths, sizes)
    blocks = torch.arange(5, dtype=torch.int32, device=DEVICE).expand(18, 1, 5).contiguous()
    results = (f(lengths, sizes, q, k, v, blocks, do, gate) for f in (computed, expected))
    for name, got, want in zip(NAMES, *results, strict=True):
        assert_close(name, got, want, rms=1e-5)


def test_a_query_without_blocks_gives_zero_and_passes_no_gradient():
    lengths, sizes = [12], spec()
    q, k, v, blocks, do, gate = inputs(lengths, sizes)
    blocks[5] = -1
    o, lse, dq, dk, dv = computed(lengths, sizes, q, k, v, blocks, do, gate)
    assert not o[5].any()
    assert (lse[5] == torch.inf).all()
    assert not dq[5].any()
    do[5] = 0
    want = expected(lengths, sizes, q, k, v, blocks, do, gate)
    assert_close("dk", dk, want[3], rms=1e-5)
    assert_close("dv", dv, want[4], rms=1e-5)


def test_dq_is_added_to_what_is_there():
    lengths, sizes = [21], spec()
    tensors = inputs(lengths, sizes)
    before = torch.randn_like(tensors[0])
    alone = computed(lengths, sizes, *tensors)
    added = computed(lengths, sizes, *tensors, dq=before)
    assert_close("dq", added[2] - before, alone[2], rms=1e-5)


def test_two_runs_give_the_same_bits():
    lengths, sizes = [19, 8], spec()
    tensors = inputs(lengths, sizes)
    runs = (computed(lengths, sizes, *tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_document_reads_another_and_no_query_its_future():
    """NaN in the other documents, and in keys and values of tokens that a query may not see, changes no bit."""
    lengths, sizes = [10, 21, 9], spec()
    q, k, v, blocks, do, gate = inputs(lengths, sizes)
    whole = computed(lengths, sizes, q, k, v, blocks, do, gate)
    poisoned = [x.clone() for x in (q, k, v, do, gate)]
    for x in poisoned:
        x[:10], x[31:] = torch.nan, torch.nan
    others = computed(lengths, sizes, *poisoned[:3], blocks, *poisoned[3:])
    for a, b in zip(whole, others, strict=True):
        assert torch.equal(a[10:31], b[10:31])
    future = [x.clone() for x in (k, v)]
    for x in future:
        x[21:31] = 7.0
    o, lse, *_ = computed(lengths, sizes, q, *future, blocks, do, gate)
    assert torch.equal(o[10:21], whole[0][10:21])
    assert torch.equal(lse[10:21], whole[1][10:21])


def test_a_gate_of_zero_passes_no_gradient():
    lengths, sizes = [12], spec()
    *tensors, gate = inputs(lengths, sizes)
    for grad in computed(lengths, sizes, *tensors, torch.zeros_like(gate))[2:]:
        assert not grad.any()


@pytest.mark.parametrize("tokens", [1, 4, 8])
def test_unions_and_readers_are_those_of_loops(tokens, monkeypatch):
    monkeypatch.setattr(selected_plan, "ITEM_TOKENS", 8)
    lengths, sizes, Hk = [25, 1, 10], spec(6, 3), 2
    blocks = inputs(lengths, sizes, Hk=Hk)[3]
    documents = table_of(lengths, sizes, empty=1)
    union = selected_plan.unions(blocks, documents, sizes, tokens, by_block=True)
    read = selected_plan.readers(union, sum(lengths), documents, sizes)
    table = documents.token_tiles(6).tolist()
    pieces = -(-6 // tokens)
    for g in range(Hk):
        chosen = [[b for b in row if b >= 0] for row in blocks[:, g].tolist()]
        for tile in range(len(table[0]) * pieces):
            start = table[0][tile // pieces] + tile % pieces * tokens
            inside = range(start, min(start + tokens, table[1][tile // pieces]))
            want = {}
            for i, t in enumerate(inside):
                for b in chosen[t]:
                    want[b] = want.get(b, 0) | 1 << i
            if inside:
                count = union.counts[g, tile]
                assert union.entries[g, tile, :count].tolist() == [b << 8 | want[b] for b in sorted(want)]
        for column, (start, _, doc_start, doc_end, _, first) in enumerate(zip(*table, strict=True)):
            mine = g * len(table[0]) + column
            want = [t for t in range(start, doc_end) if column - first in chosen[t]] if doc_start < doc_end else []
            work = read.work[:, read.work[0] == mine].T.tolist()
            assert [read.tokens[lo:hi].tolist() for _, lo, hi, _, _ in work] == [
                want[i : i + 8] for i in range(0, len(want), 8)
            ]
            assert [at for _, _, _, at, _ in work] == list(range(0, len(want), 8))
            assert all((slot < 0) == (len(work) == 1) and slot < read.slots for *_, slot in work)
    slots = [slot for slot in read.work[4].tolist() if slot >= 0]
    assert len(slots) == len(set(slots)) > 0
