"""The layers that `bench moe` times compute the same function."""

import pytest
import torch
from helpers import assert_close

from nsa_train.bench.moe import LAYERS, Case, one_pass
from nsa_train.config.schema import MoEConfig

MOE = MoEConfig(
    experts=8, shared=0, top_k=3, expert_width=16, router="sigmoid", normalise=True, routed_scale=1.0, bias_rate=0.0,
    aux_weight=0.0,
)  # fmt: skip


@pytest.mark.parametrize("load", ["even", "skewed"])
@pytest.mark.parametrize("impl", [name for name in LAYERS if name != "nsa_train"])
def test_every_layer_has_our_output_and_gradient(impl, load):
    case = Case(MOE, 24, 40, load, "cpu", torch.float32)
    (got, got_x), (want, want_x) = (one_pass(*LAYERS[name](case), case.x, case.grad) for name in (impl, "nsa_train"))
    assert_close("output", got, want, rms=1e-5)
    assert_close("gradient", got_x, want_x, rms=1e-5)


def test_a_skewed_load_is_skewed():
    loads = {}
    for load in ("even", "skewed"):
        case = Case(MOE, 24, 400, load, "cpu", torch.float32)
        scores = case.x @ case.router.T
        loads[load] = torch.zeros(8).scatter_add_(0, scores.topk(3).indices.flatten(), torch.ones(1200))
    assert loads["skewed"].max() > 1.5 * loads["even"].max()
