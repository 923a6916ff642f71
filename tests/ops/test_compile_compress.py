"""The kernels of compression compile for Hopper without spills, in few registers."""

import json

import pytest
import torch
from compiled import record, reports

from nsa_train.ops import compress_triton
from nsa_train.ops.reference import NSASpec
from nsa_train.ops.segments import Segments

WIDTHS = [50, 96, 192]
T, Hk = 4096, 4


def launches(D, dtype=torch.bfloat16):
    spec = NSASpec()
    segments = Segments(torch.empty(9, dtype=torch.int32, device="meta"), T, spec)
    x, w1, bias, w2 = (
        torch.empty(size, dtype=dtype, device="meta") for size in ((T, Hk, D), (D, spec.cmp_block * D), (D,), (D, D))
    )
    for weights in ((w1, bias, w2), (w1, bias), ()):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, *weights)]
        compress_triton.compress(leaves[0], segments, *leaves[1:]).sum().backward()


@pytest.fixture(scope="module")
def figures():
    return reports(__file__)


def test_no_kernel_spills(figures):
    assert len(figures) == 11 * len(WIDTHS)
    assert [f for f in figures if f["spills"]] == []


def test_a_thread_has_room_for_others_beside_it(figures):
    """At most 64 registers a thread: half of a multiprocessor's threads and more are resident, as memory needs it."""
    assert [f for f in figures if f["registers"] > 64] == []


if __name__ == "__main__":
    found = []
    for D in WIDTHS:
        found += [f | {"width": D} for f in record(lambda D=D: launches(D))]
    print(json.dumps(found))
