"""Maps show the largest attention of a cell and the blocks that were read, in a small file."""

import os

import pytest
import torch

from nsa_train.evaluate.maps import CELLS, Map, attention_maps, cell_tokens, map_of, plot_maps
from nsa_train.model.attention import Attended
from nsa_train.ops import statistics
from nsa_train.ops.fixed_blocks import fixed_blocks
from nsa_train.ops.nsa import NSASpec
from nsa_train.ops.reference import attend, slc_visible

SPEC = NSASpec(4, 4, slc_block=16, slc_count=8, slc_init=1, slc_local=2, window=4)
LENGTH = 1003  # cells of 4 tokens, the last one cut


def test_a_map_has_at_most_so_many_cells():
    assert [cell_tokens(n) for n in (1, CELLS, CELLS + 1, 8 * CELLS, 8 * CELLS + 1)] == [1, 1, 2, 8, 16]


@pytest.fixture(scope="module")
def attended():
    draw = torch.Generator().manual_seed(0)
    q, k = (2 * torch.randn(LENGTH, heads, 8, generator=draw) for heads in (6, 2))
    k[777, 0] = 20 * q[900, 2]  # the last head of the first KV head looks back from 900 to 777
    return Attended(q, k, fixed_blocks(torch.arange(LENGTH), 2, SPEC, torch.tensor(0)))


def test_cells_hold_the_largest_attention_of_their_tokens(attended, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK_BYTES", 4 * 3 * LENGTH * 64)  # several chunks
    found = map_of(5, attended, SPEC)
    q, k, _ = attended
    _, p = attend(q[:, :3], k[:, :1], k[:, :1], torch.ones(LENGTH, LENGTH).tril().bool(), 8**-0.5)
    want = torch.zeros(3, 1004, 1004)
    want[:, :LENGTH, :LENGTH] = torch.stack([p[0, 0], p[0, 2], p[0].mean(0)])
    torch.testing.assert_close(found.maps, want.unflatten(1, (-1, 4)).unflatten(3, (-1, 4)).amax((2, 4)))
    assert (found.layer, found.heads) == (5, (0, 2))
    assert found.maps[1, 900 // 4, 777 // 4] > 0.99


def test_chosen_cells_are_the_blocks_that_are_read(attended):
    found = map_of(0, attended, SPEC).chosen
    visible = slc_visible(attended.blocks[:, :1], LENGTH, SPEC)[:, 0].float()
    below = visible[:1000, :1000].unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).mean((1, 3))
    earlier = torch.ones_like(below).tril(-4).bool()  # blocks that end before the query
    torch.testing.assert_close(found[:250, :250][earlier], below[earlier])
    assert map_of(0, attended._replace(blocks=None), SPEC).chosen is None


def test_padding_is_no_block():
    """As in the ablation that reads forced blocks alone, here without the first one."""
    own = torch.arange(100)[:, None, None] // SPEC.slc_block
    blocks = torch.cat([own, torch.full((100, 1, 7), -1)], -1).int()
    found = map_of(0, Attended(torch.ones(100, 1, 4), torch.ones(100, 1, 4), blocks), SPEC).chosen
    assert found[:16, :16].all()
    assert not found[16:, :16].any()


def test_layers_are_the_first_the_middle_and_the_last():
    class Model:
        embed, layers = torch.nn.Embedding(2, 2), range(8)

        def watch(self, watcher):
            self.watcher = watcher

        def hidden(self, tokens, packing):
            assert packing.lengths == (30,)
            for layer in self.layers:
                self.watcher(layer, Attended(torch.ones(30, 2, 4), torch.ones(30, 2, 4), None))

    found = attention_maps(Model(), torch.zeros(30, dtype=torch.int64), SPEC)
    assert [one.layer for one in found] == [0, 3, 7]
    assert [one.heads for one in found] == [(0,)] * 3


def test_the_figure_stays_below_200_kb_with_noise_in_every_cell(tmp_path):
    draw = torch.Generator().manual_seed(0)
    noise = [(torch.rand(4, CELLS, CELLS, generator=draw) * -9).exp().tril() for _ in range(3)]
    path = tmp_path / "maps.png"
    plot_maps([Map(layer, (0, 15), maps[:3], maps[3]) for layer, maps in enumerate(noise)], "title", path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert 50_000 < os.path.getsize(path) < 200_000
