"""At ZeRO stage 3 a rank has the weights of what runs, not of the whole model."""

import json
from functools import partial

import pytest
import torch
from launch import SMALL, on_ranks

from nsa_train import runtime
from nsa_train.config.load import load_config
from nsa_train.model.transformer import Transformer
from nsa_train.packing import Packing
from nsa_train.parallel.engine import Engine, engine_settings
from nsa_train.plan.memory import whole_weights
from nsa_train.train.initial import start_weights
from nsa_train.train.optim import build_optimizer

pytestmark = pytest.mark.process
PASSES = 4  # DeepSpeed knows the order of modules from the third on, and gathers ahead


def config_of(words, **keys):
    """Of six layers, nothing of which is too small to be cut; keys are DeepSpeed's."""
    settings = ", ".join(f"{key}: {value}" for key, value in {"stage3_param_persistence_threshold": 0, **keys}.items())
    deepspeed = f"parallel.deepspeed={{zero_optimization: {{{settings}}}}}"
    return load_config([*SMALL, "parallel=zero3", "model.layers=6", deepspeed, *words])


def counted(config, folder):
    """Rank 0 writes the most elements that it has whole at once."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    dtype, T = runtime.dtype_of(config.trainer.dtype), config.trainer.seq_len
    settings = engine_settings(config.parallel, dtype, config.optim.clip, 1, PASSES, runtime.world_size())
    with torch.device("meta"):
        model = Transformer(config.model, config.attention, config.moe)
    model.recompute_activations(config.trainer.computed_again)
    start_weights(model, config.seed, None, dtype, settings)
    engine = Engine(model, build_optimizer(model, config.optim), settings)
    fetch, whole = PartitionedParameterCoordinator.fetch_sub_module, []

    def fetch_and_count(*arguments, **named):
        fetch(*arguments, **named)
        there = [p.ds_numel for p in model.parameters() if p.ds_status is not ZeroParamStatus.NOT_AVAILABLE]
        whole.append(sum(there))

    PartitionedParameterCoordinator.fetch_sub_module = fetch_and_count
    tokens = torch.arange(T) % config.model.vocab
    for _ in range(PASSES):
        engine.backward(engine(tokens, tokens, Packing.from_lengths([T]), T).token_losses.mean())
    if runtime.rank() == 0:
        (folder / "whole").write_text(json.dumps(max(whole)))


def most_gathered(config, folder):
    on_ranks(2, partial(counted, config, folder))
    return json.loads((folder / "whole").read_text())


def test_experts_are_let_go_after_their_backward_pass(tmp_path):
    """Where nothing is gathered ahead or kept, the most is embedding and head."""
    config = config_of([], stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0)
    assert most_gathered(config, tmp_path) == 2 * config.model.vocab * config.model.width


@pytest.mark.parametrize(
    ("words", "reuse", "ahead", "live"),
    [
        ([], 10**9, 5 * 10**7, 10**9),
        ([], 60_000, 0, 10**9),
        ([], 0, 3_000, 30_000),
        ([], 120_000, 3_000, 60_000),
        (["trainer.activation_checkpointing=true"], 20_000, 3_000, 40_000),
    ],
    ids=str,
)
def test_a_rank_gathers_at_most_what_the_plan_says_and_not_much_less(words, reuse, ahead, live, tmp_path):
    config = config_of(
        words, stage3_max_reuse_distance=reuse, stage3_prefetch_bucket_size=ahead, stage3_max_live_parameters=live
    )
    found = most_gathered(config, tmp_path)
    assert found <= whole_weights(config) <= 1.2 * found
