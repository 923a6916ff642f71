"""Selected attention compiles for Hopper without spills, with its wgmmas in flight and within shared memory."""

import json
import sys

import pytest
import torch
from compiled import SHARED_LIMIT, record, reports

from nsa_train.ops import selected, selected_hopper, selected_hopper_bwd
from nsa_train.ops.documents import Documents
from nsa_train.ops.reference import NSASpec

T, Hq, Hk = 4096, 64, 4
WIDTHS = [(192, 128), (128, 128), (64, 64)]
WIDER = [(256, 256)]  # on the plain kernels only, which may spill there
MODULES = {"plain": selected, "hopper": selected_hopper}
SPILLS = {("plain", 192, "_selected_dkv"): 60}  # loads and stores; accumulators alone take 160 of 255 registers


def launches(module, D, Dv, dtype=torch.bfloat16):
    spec = NSASpec()
    q, do, dq = (torch.empty(T, Hq, width, dtype=dtype, device="meta") for width in (D, Dv, D))
    k, v = (torch.empty(T, Hk, width, dtype=dtype, device="meta") for width in (D, Dv))
    blocks = torch.empty(T, Hk, spec.slc_count, dtype=torch.int32, device="meta")
    lse = torch.empty(T, Hq, device="meta")
    documents = Documents(torch.empty(5, dtype=torch.int32, device="meta"), T, spec)
    module.forward(q, k, v, blocks, documents, spec, 0.1)
    module.backward(q, k, v, blocks, do, lse, lse, documents, spec, 0.1, dq, True)


@pytest.fixture(scope="module")
def figures():
    return reports(__file__)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_no_kernel_spills(figures, widths):
    allowed = lambda f: SPILLS.get((f["path"], f["widths"][0], f["kernel"]), 0)  # noqa: E731
    assert [f for f in figures if f["widths"] == list(widths) and f["spills"] > allowed(f)] == []


def test_every_kernel_fits_into_shared_memory(figures):
    assert max(f["shared"] for f in figures) <= SHARED_LIMIT


def test_no_wgmma_is_serialised(figures):
    assert [f for f in figures if f["serialised"]] == []


if __name__ == "__main__":
    selected_hopper.programs = selected_hopper_bwd.programs = lambda device: 132
    found = []
    for name, module in MODULES.items():
        for D, Dv in WIDTHS + (WIDER if module is selected else []):
            launched = record(lambda module=module, D=D, Dv=Dv: launches(module, D, Dv))
            found += [{"path": name, "widths": (D, Dv), **f} for f in launched]
    json.dump(found, sys.stdout)
