"""The kernels of the loss and of norms compile for Hopper without spills, in few registers."""

import json

import pytest
import torch
from compiled import record, reports

from nsa_train.ops import loss_triton, norm

VOCABULARIES = [2000, 16384, 129280]  # tiny, r1, paper_27b
WIDTHS = [384, 1536, 2560, norm.WIDEST]  # r1, m, paper_27b
T = 4096


def launches_of_loss(V):
    logits, labels = (
        torch.empty(T, V, dtype=torch.bfloat16, device="meta"),
        torch.empty(T, dtype=torch.int64, device="meta"),
    )
    losses, lse = loss_triton.row_losses(logits, labels)
    loss_triton.row_gradients(logits, labels, lse, losses)


def launches_of_norms(M):
    x, y, weight = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((T, M), (T, M), (M,)))
    _, out, scales = norm.norm_kernel(x, None, weight, 1e-6)
    norm.norm_kernel(x, y, weight, 1e-6)
    norm.norm_backward_kernel(out, None, x, weight, scales)
    norm.norm_backward_kernel(out, y, x, weight, scales)


@pytest.fixture(scope="module")
def figures():
    return reports(__file__)


def test_no_kernel_spills(figures):
    assert len(figures) == 2 * len(VOCABULARIES) + 4 * len(WIDTHS)
    assert [f for f in figures if f["spills"]] == []


def test_a_thread_has_room_for_others_beside_it(figures):
    """At most 64 registers a thread: half of a multiprocessor's threads and more are resident, as memory needs it."""
    assert [f for f in figures if f["registers"] > 64] == []


if __name__ == "__main__":
    found = []
    for V in VOCABULARIES:
        found += [f | {"vocabulary": V} for f in record(lambda V=V: launches_of_loss(V))]
    for M in WIDTHS:
        found += [f | {"width": M} for f in record(lambda M=M: launches_of_norms(M))]
    print(json.dumps(found))
