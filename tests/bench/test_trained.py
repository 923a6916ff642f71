"""Blocks of a trained model come back from their file, and fill any number of tokens and KV heads."""

import numpy as np
import pytest
import torch

from nsa_train.bench.attention import SPEC
from nsa_train.bench.trained import TrainedBlocks
from nsa_train.cli import main
from nsa_train.errors import NsaTrainError
from nsa_train.ops.fixed_blocks import fixed_blocks
from nsa_train.ops.nsa import NSASpec

LENGTHS = (90, 7, 1503)


def made(layers=3, heads=2, spec=SPEC):
    """Every layer and KV head has blocks of its own."""
    parts = [fixed_blocks(torch.arange(n), layers * heads, spec, torch.tensor(0)) for n in LENGTHS]
    blocks = torch.cat(parts).unflatten(1, (layers, heads)).transpose(0, 1).numpy().astype(np.int16)
    bounds = np.cumsum([0, *LENGTHS]).astype(np.int32)
    return TrainedBlocks(blocks, bounds, np.arange(layers, dtype=np.int32), spec)


def test_a_file_gives_back_what_was_saved(tmp_path):
    one = made()
    one.save(tmp_path / "blocks.npz")
    again = TrainedBlocks.load(tmp_path / "blocks.npz", SPEC)
    assert again.spec == one.spec
    for name in ("blocks", "cu_seqlens", "layers"):
        a, b = getattr(one, name), getattr(again, name)
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


@pytest.mark.parametrize("T", [1, 90, 95, 1600, 1601, 3500])
def test_tokens_are_filled_with_whole_files_and_cut(T):
    one, lengths = made(), made().lengths(T)
    assert sum(lengths) == T
    assert tuple(lengths[:-1]) == (LENGTHS * 3)[: len(lengths) - 1]
    blocks = one.cut(T, 6)
    assert (blocks.dtype, blocks.shape) == (torch.int32, (T, 6, SPEC.slc_count))
    at = 0
    for length in lengths:  # blocks fit their document wherever it stands
        own = torch.arange(length) // SPEC.slc_block
        mine = blocks[at : at + length]
        assert (mine.amax((1, 2)) == own).all()
        at += length


@pytest.mark.parametrize(
    ("Hk", "chosen"), [(1, [0]), (2, [0, 3]), (4, [0, 1, 3, 4]), (6, range(6)), (8, [*range(6), 0, 1])]
)
def test_kv_heads_are_spread_over_layers(Hk, chosen):
    one = made()
    sets = one.blocks.transpose(1, 0, 2, 3).reshape(1600, 6, -1)
    assert len({sets[1500, i].tobytes() for i in range(6)}) == 6
    assert np.array_equal(one.cut(1600, Hk).numpy(), sets[:, list(chosen)])


def test_blocks_of_other_sizes_are_refused(tmp_path):
    made(spec=NSASpec(slc_count=8)).save(tmp_path / "blocks.npz")
    with pytest.raises(NsaTrainError, match=r"slc_count=8.*but.*slc_count=16.*is what runs here"):
        TrainedBlocks.load(tmp_path / "blocks.npz", SPEC)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--indices", "trained"], "--indices trained and --blocks FILE need one another"),
        (["--blocks", "{}/none.npz"], "need one another"),
        (["--indices", "trained", "local", "--blocks", "{}/none.npz"], "none.npz: cannot be read"),
        (["--indices", "trained", "--blocks", "{}/text.npz"], "text.npz: cannot be read"),
        (["--indices", "trained", "--blocks", "{}/other.npz"], "other.npz: cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_message(words, message, tmp_path, capsys):
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "other.npz", blocks=np.zeros(3))
    assert main(["bench", "attention", *(word.format(tmp_path) for word in words)]) == 2
    assert message in capsys.readouterr().err
