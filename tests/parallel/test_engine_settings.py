"""What DeepSpeed is told: our keys, those that were added, and no key that it does not know."""

import pytest
import torch
from deepspeed.comm import constants as comm_constants
from deepspeed.runtime import constants
from deepspeed.runtime.activation_checkpointing import config as checkpointing_constants
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from nsa_train.config.deepspeed_keys import ADDABLE, OURS
from nsa_train.config.load import load_config
from nsa_train.errors import ConfigError
from nsa_train.parallel.engine import engine_settings

ZERO = "zero_optimization"
MODULES = (constants, comm_constants, checkpointing_constants)


def settings(*overrides, dtype=torch.float32):
    config = load_config(overrides)
    return engine_settings(config.parallel, dtype, config.optim.clip, micro_rows=2, accumulation=3, world=4)


def known_to_deepspeed():
    values = [value for module in MODULES for value in vars(module).values()]
    fields = DeepSpeedZeroConfig.model_fields.items()
    return {value for value in values if isinstance(value, str)}, {n for name, f in fields for n in (name, f.alias)}


def test_every_key_that_may_be_added_or_that_we_decide_is_one_of_deepspeeds():
    top, zero = known_to_deepspeed()
    assert ADDABLE.keys() - {ZERO} <= top
    assert ADDABLE[ZERO].keys() <= zero
    assert {key for key in OURS if "." not in key} <= top
    assert {key.partition(".")[2] for key in OURS if key.startswith(ZERO)} <= zero


def test_every_key_that_we_give_is_one_of_deepspeeds():
    top, zero = known_to_deepspeed()
    for stage in ("zero1", "zero2", "zero3"):
        ours = settings(f"parallel={stage}", "parallel.offload_optimizer=cpu")
        assert ours.keys() - {ZERO} <= top
        assert ours[ZERO].keys() <= zero


def test_an_added_key_goes_to_its_place_and_leaves_the_others():
    plain = settings()
    added = settings("parallel.deepspeed={zero_optimization: {overlap_comm: true}, memory_breakdown: true}")
    assert added == {**plain, ZERO: {**plain[ZERO], "overlap_comm": True}, "memory_breakdown": True}


def test_the_rows_of_a_step_are_those_of_all_ranks_and_micro_batches():
    assert settings()["train_batch_size"] == 2 * 3 * 4


def test_gradients_travel_in_fp32_unless_said_otherwise():
    assert settings(dtype=torch.bfloat16)["communication_data_type"] == "fp32"
    assert settings("parallel.reduce_dtype=bf16", dtype=torch.bfloat16)["communication_data_type"] == "bf16"
    assert settings("parallel.reduce_dtype=bf16")["communication_data_type"] == "fp32"


def test_stage_1_is_refused_where_auto_became_bf16():
    with pytest.raises(ConfigError, match=r"trainer.dtype=auto is bf16 on a GPU, and parallel.zero_stage=1 sums"):
        settings("parallel=zero1", dtype=torch.bfloat16)
