"""A model gets its weights parameter by parameter: the bits of a model that is made whole, in the memory of a part."""

import ctypes
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from launch import SMALL, on_ranks
from safetensors.torch import load_file, save_file
from torch import nn

from nsa_train import runtime
from nsa_train.config.load import load_config
from nsa_train.errors import NsaTrainError
from nsa_train.model.transformer import Transformer
from nsa_train.parallel import materialise as module
from nsa_train.parallel.engine import Engine, engine_settings
from nsa_train.parallel.materialise import materialise
from nsa_train.train.initial import start_weights
from nsa_train.train.optim import build_optimizer

MIB = 2**20
M_MMAP_THRESHOLD = -3  # of malloc.h


# Values ---------------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "ZeRO 1": (2, ["parallel=zero1"]),
    "ZeRO 2, bf16": (2, ["parallel=zero2", "trainer.dtype=bf16"]),
    "ZeRO 3": (2, ["parallel=zero3", "attention.phi=linear"]),
    "ZeRO 3, bf16, tied embeddings": (3, ["parallel=zero3", "trainer.dtype=bf16", "model.tied_embeddings=true"]),
    "ZeRO 3, one process": (1, ["parallel=zero3", "attention.phi=gated_pool"]),
    "ZeRO 3, offloaded, bf16": (
        2, ["parallel=zero3", "trainer.dtype=bf16", "parallel.offload_optimizer=cpu", "parallel.offload_params=cpu"],
    ),
}  # fmt: skip


def settings_of(config):
    dtype = runtime.dtype_of(config.trainer.dtype)
    return engine_settings(config.parallel, dtype, config.optim.clip, 1, 1, runtime.world_size())


def started(words, folder):
    """Rank 0 writes the weights that the engine starts with, their hashes, and how the optimizer groups them."""
    config = load_config([*SMALL, *words])
    settings = settings_of(config)
    with torch.device("meta"):
        model = Transformer(config.model, config.attention, config.moe)
    hashes, _ = start_weights(model, config.seed, None, runtime.dtype_of(config.trainer.dtype), settings)
    optimizer = build_optimizer(model, config.optim)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying = [names[id(parameter)] for parameter in optimizer.param_groups[0]["params"]]
    engine = Engine(model, optimizer, settings)
    whole = engine.whole_weights()
    if runtime.rank() == 0:
        save_file(whole, folder / "weights")
        (folder / "facts").write_text(json.dumps([hashes, decaying, engine.shapes]))


@pytest.mark.process
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_hashes_shapes_and_decay_are_those_of_a_model_made_whole(layout, tmp_path):
    world, words = LAYOUTS[layout]
    on_ranks(world, partial(started, words, tmp_path))
    config = load_config([*SMALL, *words])
    whole = Transformer(config.model, config.attention, config.moe)
    whole.start(config.seed)
    hashes, decaying, shapes = json.loads((tmp_path / "facts").read_text())
    found, dtype = load_file(tmp_path / "weights"), runtime.dtype_of(config.trainer.dtype)
    parameters = dict(whole.named_parameters())
    assert found.keys() == parameters.keys() | dict(whole.named_buffers()).keys()
    for name, parameter in parameters.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], parameter.detach().to(dtype)), name
    for name, buffer in whole.named_buffers():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], buffer)
    assert list(hashes.items()) == [
        (f"{name} {list(p.shape)}", hashlib.sha256(p.detach().numpy()).hexdigest())
        for name, p in sorted(parameters.items())
    ]
    assert shapes == {name: list(parameter.shape) for name, parameter in parameters.items()}
    groups = build_optimizer(whole, config.optim).param_groups
    assert decaying == [name for p in groups[0]["params"] for name, q in parameters.items() if q is p]


# Memory and threads ---------------------------------------------------------------------------------------------------

PARAMETERS, EACH = 40, 4 * MIB  # bytes of each in fp32


def large(parameters=PARAMETERS):
    with torch.device("meta"):
        return nn.ParameterList(nn.Parameter(torch.empty(EACH // 4)) for _ in range(parameters))


def ones(parameters=PARAMETERS):
    return {str(number): partial(torch.ones, EACH // 4) for number in range(parameters)}


def measured(folder):
    """Write by how much this rank's memory has grown at most, and what its parts of the parameters take."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB)  # what is freed goes back to the system, as large parameters do
    module.AHEAD_BYTES = 2 * EACH
    settings = settings_of(load_config(["parallel=zero3"]))
    materialise(large(1), ones(1), torch.float32, settings)  # what every first use loads
    before = runtime.peak_resident_bytes()
    model = large()
    materialise(model, ones(), torch.float32, settings)
    grown = runtime.peak_resident_bytes() - before
    held = sum(4 * parameter.ds_tensor.numel() for parameter in model)
    (folder / str(runtime.rank())).write_text(json.dumps([grown, held]))


@pytest.mark.process
def test_at_stage_3_a_rank_holds_its_part_and_a_few_parameters(tmp_path):
    on_ranks(4, partial(measured, tmp_path))
    for rank in range(4):
        grown, held = json.loads((tmp_path / str(rank)).read_text())
        assert held == PARAMETERS * EACH / 4
        assert grown < held + 5 * EACH


def test_threads_work_ahead_in_order_as_far_as_the_bytes_go(monkeypatch):
    monkeypatch.setattr(module, "AHEAD_BYTES", 10)
    sizes = [4, 4, 4, 30, 1, 9, 1]
    with ThreadPoolExecutor(8) as threads:
        ahead = module._Ahead(threads, ((size, partial(int, number)) for number, size in enumerate(sizes)))
        begun = []
        for number in range(len(sizes)):
            begun.append([size for size, _ in ahead._begun])
            assert ahead.next() == number
    assert begun == [[4, 4], [4, 4], [4], [30], [1, 9], [9, 1], [1]]


def refused():
    raise NsaTrainError("the parameter cannot be read")


def failing():
    make = ones() | {"1": refused}
    with pytest.raises(NsaTrainError, match="cannot be read"):
        materialise(large(), make, torch.float32, settings_of(load_config(["parallel=zero2"])))


@pytest.mark.process
def test_what_one_rank_cannot_make_all_ranks_refuse():
    on_ranks(2, failing)
