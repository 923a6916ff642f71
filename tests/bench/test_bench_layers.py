"""The small parts that `bench layers` times compute the same function."""

import pytest
import torch
from helpers import assert_close

from nsa_train.bench.layers import implementations, one_pass, parts
from nsa_train.config.load import load_config

CONFIG = load_config(["experiment=tiny", "trainer.loss_chunk_tokens=16"])
PARTS = parts(CONFIG, 40, "cpu", torch.float32)


@pytest.mark.parametrize("name", PARTS)
def test_pytorchs_operations_have_our_outputs_and_gradients(name):
    made = implementations(PARTS[name])
    got, want = (one_pass(made[impl](), PARTS[name].leaves) for impl in ("torch", "nsa_train"))
    assert len(got) == len(want) > len(PARTS[name].leaves)
    for number, (one, other) in enumerate(zip(got, want, strict=True)):
        assert_close(f"{name} {number}", one, other, rms=1e-5)
