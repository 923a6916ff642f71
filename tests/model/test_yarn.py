"""YaRN: which pairs turn slower, how much sharper scores get, and that every branch takes part."""

import math

import pytest
import torch
from cases import LENGTHS, MODEL, build, nsa, rows
from helpers import assert_close

from nsa_train.model.attention import Attention
from nsa_train.model.layers import rope_angles
from nsa_train.packing import Packing

THETA, TRAINED_LEN, FACTOR = 10000.0, 4096, 8.0


def frequencies(factor, dim=64):
    """Angle from position 0 to 1, and the length of the rotated pairs."""
    cos, sin = rope_angles(torch.tensor([1]), dim, THETA, factor, TRAINED_LEN)
    return torch.atan2(sin, cos)[0], (cos**2 + sin**2).sqrt()[0]


def test_yarn_with_factor_1_changes_no_bit():
    plain = rope_angles(torch.arange(100), 64, THETA)
    assert all(map(torch.equal, plain, rope_angles(torch.arange(100), 64, THETA, 1.0, TRAINED_LEN)))


def test_yarn_keeps_fast_pairs_slows_slow_ones_and_ramps_between():
    """Equations 17 to 23 of arXiv 2309.00071, pair by pair."""
    found, _ = frequencies(FACTOR)
    for pair, got in enumerate(found.tolist()):
        theta = THETA ** (-2 * pair / 64)
        turns = TRAINED_LEN * theta / (2 * math.pi)
        gamma = 0.0 if turns < 1 else 1.0 if turns > 32 else (turns - 1) / 31
        assert got == pytest.approx((1 - gamma) * theta / FACTOR + gamma * theta, rel=1e-5)
    kept = found / frequencies(1.0)[0]
    assert (kept[:8], kept[-1]) == (pytest.approx(torch.ones(8)), pytest.approx(1 / FACTOR))
    assert ((kept > 1 / FACTOR + 0.01) & (kept < 0.99)).sum() >= 5


def test_outside_of_the_ramp_yarn_is_that_of_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "yarn", "factor": FACTOR, "original_max_position_embeddings": TRAINED_LEN, "rope_theta": THETA,
    }  # fmt: skip
    config = LlamaConfig(head_dim=64, max_position_embeddings=int(FACTOR * TRAINED_LEN), rope_parameters=scaling)
    theirs, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    found, length = frequencies(FACTOR)
    assert length == pytest.approx(torch.full((32,), attention_factor), rel=1e-5)
    turns = TRAINED_LEN * frequencies(1.0)[0] / (2 * math.pi)
    outside = (turns < 0.7) | (turns > 40)
    assert outside.sum() > 15
    assert found[outside] == pytest.approx(theirs[outside], rel=1e-5)


@pytest.mark.parametrize("branches", [("cmp", "slc", "win"), ("full",)])
def test_yarn_sharpens_the_scores_of_every_branch(branches):
    """With one frequency so slow that rotation does not show, only the attention factor remains."""
    arm = nsa(branches=branches, gate=len(branches) > 1, phi="mean")
    packing = Packing.from_lengths(LENGTHS)
    x = torch.randn(packing.tokens, MODEL.width, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(packing.tokens, MODEL.key_dim // 2)
    sharper = 0.1 * math.log(FACTOR) + 1
    layer = Attention(MODEL, arm)
    with torch.no_grad():
        found = layer(x, layer.layout(packing, (ones * sharper, 0 * ones)))
        for projection in [layer.q, *(kv.k for kv in layer.kv.values())]:
            projection.weight *= sharper
        assert_close("output", found, layer(x, layer.layout(packing, (ones, 0 * ones))), rms=1e-5)


def test_a_stages_factor_reaches_the_model():
    model, (tokens, _, packing) = build(), rows()
    with torch.no_grad():
        before = model.hidden(tokens, packing)[0]
        model.rope_factor = 4.0
        assert not torch.equal(model.hidden(tokens, packing)[0], before)
        assert torch.equal(model.hidden(tokens, packing)[0], build(rope_factor=4.0).hidden(tokens, packing)[0])
