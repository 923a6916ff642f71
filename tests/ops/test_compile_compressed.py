"""The compressed branch and the selection compile for Hopper without spills, with their wgmmas in flight."""

import json

import pytest
import torch
from compiled import SHARED_LIMIT, record, reports

from nsa_train.ops import compressed
from nsa_train.ops.documents import Documents
from nsa_train.ops.nsa import NSASpec

T, Hq, Hk = 4096, 64, 4
WIDTHS = [(192, 128), (128, 128), (64, 64)]


def launches(module, D, Dv, dtype=torch.bfloat16):
    spec = NSASpec()
    q, do, dq = (torch.empty(T, Hq, width, dtype=dtype, device="meta") for width in (D, Dv, D))
    k, v = (torch.empty(T // 16, Hk, width, dtype=dtype, device="meta") for width in (D, Dv))
    lse = torch.empty(T, Hq, device="meta")
    documents = Documents(torch.empty(5, dtype=torch.int32, device="meta"), T, spec)
    module.forward(q, k, v, documents, spec, 0.1)
    module.backward(q, k, v, do, lse, lse, documents, spec, 0.1, dq, True)


@pytest.fixture(scope="module")
def figures():
    return reports(__file__)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_no_kernel_spills(figures, widths):
    assert [f for f in figures if f["widths"] == list(widths) and f["spills"]] == []


def test_every_kernel_fits_into_shared_memory(figures):
    assert max(f["shared"] for f in figures) <= SHARED_LIMIT


def test_no_wgmma_is_serialised(figures):
    assert [f for f in figures if f["serialised"]] == []


if __name__ == "__main__":
    found = []
    for D, Dv in WIDTHS:
        found += [{"widths": (D, Dv), **f} for f in record(lambda D=D, Dv=Dv: launches(compressed, D, Dv))]
    print(json.dumps(found))
