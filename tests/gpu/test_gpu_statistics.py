"""Statistics of the selection at the size of `r1` on a GPU: the CPU's numbers, in bounded memory, within seconds."""

import time

import pytest
import torch

from nsa_train.ops import statistics
from nsa_train.ops.fixed_blocks import fixed_blocks
from nsa_train.ops.nsa import NSASpec

pytestmark = pytest.mark.gpu

SPEC = NSASpec()
FIRST = SPEC.slc_count * SPEC.slc_block


def case(L):
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(L, heads, 64, generator=draw).bfloat16() for heads in (16, 1))
    return q, k, fixed_blocks(torch.arange(L), 1, SPEC, torch.tensor(0))


def test_a_gpu_finds_what_a_cpu_finds():
    q, k, blocks = case(1500)
    found = statistics.attention_held(q.cuda(), k.cuda(), blocks.cuda(), FIRST, SPEC)
    for got, want in zip(found, statistics.attention_held(q, k, blocks, FIRST, SPEC), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=0)
    for n in (2, 4, 8):
        assert torch.equal(statistics.distinct_blocks(blocks.cuda(), n).cpu(), statistics.distinct_blocks(blocks, n))


def test_a_row_of_r1_takes_a_second_and_a_gibibyte_at_most():
    q, k, blocks = (x.cuda() for x in case(8192))
    statistics.attention_held(q[:2048], k[:2048], blocks[:2048], FIRST, SPEC)  # libraries load
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held, start = torch.cuda.memory_allocated(), time.perf_counter()
    statistics.attention_held(q, k, blocks, FIRST, SPEC)
    torch.cuda.synchronize()
    assert time.perf_counter() - start < 1
    assert torch.cuda.max_memory_allocated() - held < 2**30
