"""The kernels of routing, routed experts and rotary positions compile for Hopper without spills, in few registers."""

import json

import pytest
import torch
from compiled import record, reports

from nsa_train.ops import experts_triton, rope, routing_triton

WIDTHS = [(384, 192), (1536, 768), (2560, 1536)]  # of the model, of an expert: r1, m, paper_27b
ROUTERS = [(32, 6, False), (72, 6, True), (256, 8, False), (256, 16, False)]  # experts, of a token, softmax
T, K = 4096, 6


def launches(M, F, dtype=torch.bfloat16):
    gate_up, h, rows = (
        torch.empty(size, dtype=dtype, device="meta") for size in ((T * K, 2 * F), (T * K, F), (T * K, M))
    )
    order, places = (torch.empty(size, dtype=torch.int64, device="meta") for size in (T * K, (T, K)))
    weights = torch.empty(T, K, device="meta")
    experts_triton.swiglu(gate_up)
    experts_triton.swiglu_backward(gate_up, h)
    experts_triton.sum_rows(rows, places, weights)
    experts_triton.sum_rows(rows, places, None)
    experts_triton.spread_rows(rows[: len(places)], places)
    experts_triton.weighted_swiglu_backward(gate_up, h, order, weights)
    for D in (64, 192):
        x, angle = torch.empty(T, 4, D, dtype=dtype, device="meta"), torch.empty(T, D // 2, device="meta")
        rope.rotate_kernel(x, angle, angle, 1.0)


def routing_launches(E, K, softmax):
    logits, bias = torch.empty(T, E, device="meta"), torch.empty(E, device="meta")
    cu_seqlens = torch.empty(9, dtype=torch.int32, device="meta")
    rules = softmax, True, 2.5
    experts, weights, counts, _ = routing_triton.route(logits, bias, cu_seqlens, K, *rules)
    routing_triton.route_backward(logits, experts, counts, cu_seqlens, weights, bias.sum(), *rules)


@pytest.fixture(scope="module")
def figures():
    return reports(__file__)


def test_no_kernel_spills(figures):
    assert len(figures) == 8 * len(WIDTHS) + 3 * len(ROUTERS)
    assert [f for f in figures if f["spills"]] == []


def test_a_thread_has_room_for_others_beside_it(figures):
    """At most 72 registers a thread: some half of a multiprocessor's threads are resident, as memory needs it.

    Those that choose experts compute more than they read.
    """
    assert [f for f in figures if f["registers"] > (128 if f["kernel"].startswith("_route") else 72)] == []


if __name__ == "__main__":
    found = []
    for M, F in WIDTHS:
        found += [f | {"widths": (M, F)} for f in record(lambda M=M, F=F: launches(M, F))]
    for router in ROUTERS:
        found += record(lambda router=router: routing_launches(*router))
    print(json.dumps(found))
