"""The sliding window kernels against `reference.attend` under `reference.win_visible`, every output and gradient."""

import pytest
import torch
from helpers import assert_close
from window_cases import NAMES, computed, expected, inputs

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_poison")


@pytest.mark.parametrize(
    ("lengths", "w", "shape"),
    [
        ([70], 5, {}),  # narrow tiles for everything
        ([1, 16, 17, 40], 16, {}),  # w is one tile, ends beside its edges
        ([45], 21, {"G": 16}),  # 8 tokens a program, older keys behind whole tiles
        ([34, 3], 33, {"Hk": 2, "G": 3, "D": 7, "Dv": 5}),  # odd everything
        ([66, 63, 1], 64, {"G": 1, "D": 24, "Dv": 20}),  # two widths of keys, 64 tokens in a tile
        ([20], 100, {"G": 1}),  # wider than the document
        ([9, 4], 1, {"G": 1}),  # a query sees itself only
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
