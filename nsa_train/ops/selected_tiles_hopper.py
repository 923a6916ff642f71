"""What forward and dQ of selected attention share on Hopper: the walk over tiles, and the warp that brings blocks.

A work item is a tile of 8 tokens times a KV head, KV head by KV head, because the keys of one head fit into the L2
cache. A block is loaded once for all 8 tokens; the two consumer warpgroups own 4 tokens times 16 heads each, and one
none of whose tokens chose the block skips it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from nsa_train.ops.gluon_names import tma_load
from nsa_train.ops.tiles_hopper import load_wide, token_piece

BLOCK = 64  # keys of a selection block
STAGES = 3  # of K and V; 2 lose 5 %, 4 gain nothing


@gluon.jit
def work_item(table, M, item):
    """(KV head, start, end, doc_start) of a tile; empty: start >= end."""
    start, end, doc_start, _ = token_piece(table, M, item % (M * 8))
    return item // (M * 8), start, end, doc_start


@gluon.jit
def produce_blocks(
    k1_desc, k2_desc, v_desc, k1_buf, k2_buf, v_buf, full, empty, table, entries, counts, M,
    Hk: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, D2: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Producer warp: the keys and values of every block of every tile's union, through a ring of STAGES."""
    steps = 0
    for item in range(gl.program_id(0), M * 8 * Hk, gl.num_programs(0)):
        g, start, end, doc_start = work_item(table, M, item)
        if start < end:
            n = gl.load(counts + item)
            union = entries + item * (8 * N)
            entry = gl.load(union)
            for i in range(n):
                following = gl.load(union + i + 1, mask=i + 1 < n, other=0)
                stage = steps % STAGES
                row = doc_start + (entry >> 8) * 64
                mbarrier.wait(empty.index(stage), ((steps // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(stage), 64 * (D + DV) * 2)
                load_wide(k1_desc, k2_desc, k1_buf.index(stage), k2_buf.index(stage), full.index(stage), row, g * D, D2)
                tma_load(v_desc, [row, g * DV], full.index(stage), v_buf.index(stage))
                entry = following
                steps += 1
