"""The kernels of the loss compile for Hopper without spills, in few registers."""

import json

import pytest
import torch
from compiled import record, reports

from nsa_train.ops import loss_triton

VOCABULARIES = [2000, 16384, 129280]  # tiny, r1, paper_27b
T = 4096


def launches(V):
    logits, labels = (
        torch.empty(T, V, dtype=torch.bfloat16, device="meta"),
        torch.empty(T, dtype=torch.int64, device="meta"),
    )
    losses, lse = loss_triton.row_losses(logits, labels)
    loss_triton.row_gradients(logits, labels, lse, losses)


@pytest.fixture(scope="module")
def figures():
    return reports(__file__)


def test_no_kernel_spills(figures):
    assert len(figures) == 2 * len(VOCABULARIES)
    assert [f for f in figures if f["spills"]] == []


def test_a_thread_has_room_for_others_beside_it(figures):
    """At most 64 registers a thread: half of a multiprocessor's threads and more are resident, as memory needs it."""
    assert [f for f in figures if f["registers"] > 64] == []


if __name__ == "__main__":
    found = []
    for V in VOCABULARIES:
        found += [f | {"vocabulary": V} for f in record(lambda V=V: launches(V))]
    print(json.dumps(found))
