"""Which parameters decay, and the learning rate of each step."""

import math
from itertools import pairwise

import pytest
import torch

from nsa_train.config.load import load_config
from nsa_train.model.transformer import Transformer
from nsa_train.train.optim import build_optimizer, lr_at


def schedule(kind, **shares):
    return load_config([f"schedule={kind}", *(f"schedule.{key}={value}" for key, value in shares.items())]).schedule


def rates(kind, steps=100, **shares):
    chosen = schedule(kind, **shares)
    return [lr_at(step, steps, 2.0, chosen) for step in range(steps)]


def test_matrices_decay_but_embeddings_norms_and_biases_do_not():
    config = load_config()
    with torch.device("meta"):
        model = Transformer(config.model, config.attention, config.moe)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = build_optimizer(model, config.optim).param_groups
    decaying, not_decaying = ({names[id(p)] for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [config.optim.weight_decay, 0.0]
    assert decaying | not_decaying == set(names.values())
    assert {"head.weight", "layers.1.mlp.gate_up", "layers.0.attention.q.weight"} <= decaying
    assert {"embed.weight", "norm.weight", "layers.0.attention.phi_k.bias"} <= not_decaying


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_the_rate_rises_in_equal_steps_to_the_peak_and_the_first_update_is_not_lost(kind):
    found = rates(kind, warmup_share=0.1)
    assert found[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert max(found) == pytest.approx(2.0)


def test_cosine_falls_from_the_peak_to_the_final_share():
    found = rates("cosine", warmup_share=0.0, final_share=0.1)
    assert found[0] == 2.0
    assert found[50] == pytest.approx(2.0 * 0.55)
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(0.2, abs=2e-3)


def test_wsd_stays_at_the_peak_and_then_falls_in_a_line():
    found = rates("wsd", warmup_share=0.0, decay_share=0.2, final_share=0.1)
    assert found[:81] == pytest.approx([2.0] * 81)
    assert [a - b for a, b in pairwise(found[80:])] == pytest.approx([0.09] * 19)


def test_the_decay_of_wsd_is_a_share_of_the_steps_behind_the_warm_up():
    found = rates("wsd", warmup_share=0.5, decay_share=0.2, final_share=0.1)
    assert found[50:91] == pytest.approx([2.0] * 41)
    assert [a - b for a, b in pairwise(found[90:])] == pytest.approx([0.18] * 9)


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_short_runs_have_finite_rates(kind, steps):
    assert all(math.isfinite(rate) and 0 < rate <= 2.0 for rate in rates(kind, steps=steps))
