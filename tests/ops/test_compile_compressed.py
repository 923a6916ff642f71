"""The compressed branch and the selection compile for Hopper without spills, with their wgmmas in flight."""

import json

import pytest
import torch
from compiled import SHARED_LIMIT, record, reports

from nsa_train.ops import compressed, compressed_hopper, select, select_hopper
from nsa_train.ops.documents import Documents
from nsa_train.ops.nsa import NSASpec

T, Hq, Hk = 4096, 64, 4
WIDTHS = [(192, 128), (128, 128), (64, 64)]


def launches(module, selection, D, Dv, dtype=torch.bfloat16):
    spec = NSASpec()
    q, do, dq = (torch.empty(T, Hq, width, dtype=dtype, device="meta") for width in (D, Dv, D))
    k, v = (torch.empty(T // 16, Hk, width, dtype=dtype, device="meta") for width in (D, Dv))
    lse = torch.empty(T, Hq, device="meta")
    documents = Documents(torch.empty(5, dtype=torch.int32, device="meta"), T, spec)
    module.forward(q, k, v, documents, spec, 0.1)
    selection.select_blocks(q, k, lse, documents, spec, 0.1)
    module.backward(q, k, v, do, lse, lse, documents, spec, 0.1, dq, True)


@pytest.fixture(scope="module")
def figures():
    return reports(__file__)


def test_only_dk_and_dv_at_192_spill_and_little(figures):
    """160 accumulator registers a thread leave no room there: 11 instructions in the plain kernel, 34 in the other."""
    spills = {(f["kernel"], f["widths"][0]): f["spills"] for f in figures if f["spills"]}
    assert set(spills) <= {("_compressed_dkv", 192), ("_compressed_dkv_hopper", 192)}
    assert max(spills.values()) <= 40


def test_every_kernel_of_both_paths_is_there(figures):
    found = [f["kernel"] for f in figures]
    assert len(found) == 12 * len(WIDTHS)
    assert len(set(found)) == 10  # top-n and the sum of dK, dV serve both paths


def test_every_kernel_fits_into_shared_memory(figures):
    assert max(f["shared"] for f in figures) <= SHARED_LIMIT


def test_no_wgmma_is_serialised(figures):
    assert [f for f in figures if f["serialised"]] == []


if __name__ == "__main__":
    found = []
    for D, Dv in WIDTHS:
        for path in ((compressed, select), (compressed_hopper, select_hopper)):
            found += [{"widths": (D, Dv), **f} for f in record(lambda w=(D, Dv), p=path: launches(*p, *w))]
    print(json.dumps(found))
