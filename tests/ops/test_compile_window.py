"""The window and the gated sum compile for Hopper without spills, with their wgmmas in flight."""

import json

import pytest
import torch
from compiled import SHARED_LIMIT, record, reports

from nsa_train.ops import combine, window, window_hopper, window_hopper_bwd
from nsa_train.ops.documents import Documents
from nsa_train.ops.nsa import NSASpec

T, Hq, Hk = 4096, 64, 4
WIDTHS = [(192, 128), (128, 128), (64, 64)]
WIDER = [(256, 256)]  # on the plain kernels only, which may spill there


def launches(module, D, Dv, dtype=torch.bfloat16):
    spec = NSASpec()
    q, do, dq = (torch.empty(T, Hq, width, dtype=dtype, device="meta") for width in (D, Dv, D))
    k, v = (torch.empty(T, Hk, width, dtype=dtype, device="meta") for width in (D, Dv))
    lse = torch.empty(T, Hq, device="meta")
    documents = Documents(torch.empty(5, dtype=torch.int32, device="meta"), T, spec)
    module.forward(q, k, v, documents, spec, 0.1)
    module.backward(q, k, v, do, lse, lse, documents, spec, 0.1, dq, True)


def combine_launches(Dv, dtype=torch.bfloat16):
    o, gates, lse = (
        torch.empty(T, Hq, Dv, dtype=dtype, device="meta"), torch.empty(T, Hq, 3, dtype=dtype, device="meta"),
        torch.empty(T, Hq, device="meta"),
    )  # fmt: skip
    combine.forward(gates, o, o, o)
    combine.backward(o, gates, (o, o, o), (lse, lse, lse))


@pytest.fixture(scope="module")
def figures():
    return reports(__file__)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_no_kernel_spills(figures, widths):
    """Of the gradients of keys at 192, 4 or 8 instructions do, 2 of them in the loop."""
    allowed = {"_win_dkv_hopper": 8} if widths == (192, 128) else {}
    mine = [f for f in figures if f["widths"] == list(widths)]
    assert len(mine) == 8
    assert [f for f in mine if f["spills"] > allowed.get(f["kernel"], 0)] == []


def test_every_kernel_fits_into_shared_memory(figures):
    assert max(f["shared"] for f in figures) <= SHARED_LIMIT


def test_no_wgmma_is_serialised(figures):
    assert [f for f in figures if f["serialised"]] == []


if __name__ == "__main__":
    window_hopper.programs = window_hopper_bwd.programs = lambda device: 132
    found = []
    for D, Dv in WIDTHS:
        for module in (window, window_hopper):
            found += [{"widths": (D, Dv), **f} for f in record(lambda w=(D, Dv), m=module: launches(m, *w))]
        found += [{"widths": (D, Dv), **f} for f in record(lambda Dv=Dv: combine_launches(Dv))]
    for D, Dv in WIDER:
        found += [{"widths": (D, Dv), **f} for f in record(lambda w=(D, Dv): launches(window, *w))]
    print(json.dumps(found))
