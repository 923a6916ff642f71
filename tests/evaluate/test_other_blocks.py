"""The script that gives a trained model other blocks: what it chooses, and that the model reads them."""

from unittest import mock

import pytest
import torch
from helpers import load_script

from nsa_train.config.load import load_config
from nsa_train.model.transformer import Transformer
from nsa_train.ops.nsa import NSASpec
from nsa_train.ops.statistics import attention_held
from nsa_train.packing import Packing

SPEC = NSASpec(cmp_block=8, cmp_stride=8, slc_block=8, slc_count=4, slc_init=1, slc_local=2, window=8)
L, HK, G, D = 96, 2, 3, 16


@pytest.fixture
def script(monkeypatch):
    return load_script("other_blocks", monkeypatch)


def test_the_best_blocks_hold_most(script):
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(L, heads, D, generator=draw) * 2 for heads in (HK * G, HK))
    held = attention_held(q, k, script.best(q, k, SPEC, 0), SPEC.slc_count * SPEC.slc_block, SPEC)
    others = [attention_held(q, k, choose(q, k, SPEC, 0), 32, SPEC) for choose in (script.drawn, script.by_pooled_keys)]
    assert all((held.selected > other.selected).all() for other in others)


def test_pooled_keys_choose_the_best_where_those_of_a_block_are_equal(script):
    draw = torch.Generator().manual_seed(1)
    q = torch.randn(L, HK, D, generator=draw)  # heads of a group would be weighed by what else they see
    k = torch.randn(L // SPEC.slc_block, HK, D, generator=draw).repeat_interleave(SPEC.slc_block, 0)
    blocks = script.by_pooled_keys(q, k, SPEC, 0)
    assert torch.equal(blocks, script.best(q, k, SPEC, 0))
    assert not torch.equal(blocks, script.drawn(q, k, SPEC, 0))


def test_documents_shorter_than_a_compression_block_have_their_own_block(script):
    q, k = torch.randn(5, HK * G, D), torch.randn(5, HK, D)
    assert torch.equal(script.by_pooled_keys(q, k, SPEC, 0), script.best(q, k, SPEC, 0))


def test_the_model_reads_the_blocks_that_are_chosen(script):
    small = ["attention.slc_block=16", "attention.slc_count=4", "attention.cmp_block=16", "attention.cmp_stride=8"]
    config = load_config(["attention=nsa", "model.layers=2", *small])
    model = Transformer(config.model, config.attention, config.moe)
    model.start(seed=0)
    tokens = torch.randint(0, config.model.vocab, (200,), generator=torch.Generator().manual_seed(2))
    packing = Packing.from_lengths([50, 150])
    asked = []

    def spied(q, k, spec, layer):
        asked.append((layer, len(q)))
        return script.drawn(q, k, spec, layer)

    with torch.no_grad():
        own, *_ = model.hidden(tokens, packing)
        with mock.patch("nsa_train.model.attention.nsa_attention", script.reading(spied, 2)):
            other, *_ = model.hidden(tokens, packing)
    everything = 50 + 4 * 16  # tokens that read all blocks before them
    assert torch.equal(own[:everything], other[:everything])
    assert not torch.equal(own[everything:], other[everything:])
    assert asked == [(0, 50), (0, 150), (1, 50), (1, 150)]


def test_blocks_are_drawn_anew_in_every_layer(script):
    q, k = torch.randn(L, HK * G, D), torch.randn(L, HK, D)
    assert torch.equal(script.drawn(q, k, SPEC, 0), script.drawn(q, k, SPEC, 0))
    assert not torch.equal(script.drawn(q, k, SPEC, 0), script.drawn(q, k, SPEC, 1))
