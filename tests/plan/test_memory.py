"""The plan's activations against what autograd keeps when the model runs on its kernels, in Triton's interpreter."""

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from nsa_train.config.load import load_config
from nsa_train.model import layers
from nsa_train.model.counts import meta_model
from nsa_train.model.transformer import Transformer
from nsa_train.ops import compress, experts, norm, routing
from nsa_train.ops.rope import _Rotate
from nsa_train.packing import Packing
from nsa_train.plan.memory import STAGE_3, gathered, kept, memory, whole_weights

SIZES = [
    "trainer.dtype=fp32", "model.layers=3", "model.width=64", "model.heads=4", "model.kv_heads=1", "model.key_dim=32",
    "model.value_dim=16", "model.vocab=400", "moe.experts=4", "moe.expert_width=64", "trainer.seq_len=96",
    "trainer.micro_rows=1", "attention.backend=triton",
]  # fmt: skip


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    for op in (compress, experts, norm, routing):
        monkeypatch.setattr(op, "on_kernels", lambda x: True)
    monkeypatch.setattr(layers, "rotate", _Rotate.apply)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("arm", "parts"),
    [*(("nsa", parts) for parts in ((), ("attention",), ("mlp",), ("attention", "mlp"))), ("nsa_shared_kv", ())],
)
def test_what_is_kept_is_what_the_plan_says(arm, parts):
    chosen = ["trainer.activation_checkpointing=true", f"trainer.recomputed=[{','.join(parts)}]"] if parts else []
    config = load_config([*SIZES, f"attention={arm}", *chosen])
    model = Transformer(config.model, config.attention, config.moe)
    model.start(0)
    model.recompute_activations(parts)
    T = config.trainer.seq_len
    tokens, packing = torch.arange(T) % config.model.vocab, Packing.from_lengths([T])
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    storages = {}

    def note(x):
        if x.untyped_storage().data_ptr() not in own:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held, so that no address comes twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        model(tokens, tokens, packing, T)
    found = sum(storage.nbytes() for storage in storages.values())
    assert sum(kept(config, T).values()) == pytest.approx(found, rel=0.06)


def test_longer_passes_and_fewer_ranks_need_more_and_recomputation_less():
    def gib(ranks, *options):
        return memory(load_config(["experiment=m", *options]), ranks).total / 2**30

    assert gib(1) > gib(8) > gib(64)
    assert gib(8, "trainer.micro_rows=4") > gib(8) + 10
    assert gib(8, "trainer.activation_checkpointing=true") < gib(8) - 10
    assert gib(8, "parallel=zero3") < gib(8)


def test_what_is_offloaded_takes_no_memory_of_the_gpu():
    """With ZeRO 2 the sums of gradients stay there, beside a copy on the host."""

    def on_gpu(stage, *words):
        found = memory(load_config(["experiment=m", f"parallel=zero{stage}", *words]), 8).states
        return {part for part, size in found.items() if size and part != "communication"}

    optimizer, params = "parallel.offload_optimizer=cpu", "parallel.offload_params=cpu"
    assert on_gpu(2) == on_gpu(3) == {"weights", "gradients", "optimizer"}
    assert on_gpu(2, optimizer) == {"weights", "gradients"}
    assert on_gpu(3, optimizer) == {"weights"}
    assert on_gpu(3, params) == {"gradients", "optimizer"}
    assert on_gpu(3, optimizer, params) == set()


def test_buckets_are_there_where_gradients_travel_or_are_not_added_at_once():
    def gib_of_buckets(ranks, *words):
        return memory(load_config(["experiment=m", *words]), ranks).states["communication"] / 2**30

    assert gib_of_buckets(1) == 0
    assert gib_of_buckets(1, "trainer.dtype=fp32") > 0.7
    for ranks, words in ((2, []), (1, ["parallel.offload_optimizer=cpu"])):
        assert 0.3 < gib_of_buckets(ranks, *words) < 0.4
    assert 0.7 < gib_of_buckets(1, "parallel=zero3") < 0.8  # stage 3 has a bucket in the dtype that travels, fp32
    assert 0.3 < gib_of_buckets(1, "parallel=zero3", "parallel.reduce_dtype=bf16", "trainer.dtype=bf16") < 0.4
    assert 0.7 < gib_of_buckets(2, "parallel=zero1", "trainer.dtype=fp32") < 0.8
    assert gib_of_buckets(2) == gib_of_buckets(2, "experiment=r1", "trainer.dtype=bf16")  # of full size in any case


@pytest.mark.parametrize("parts", [("attention",), ("mlp",), ("attention", "mlp")], ids=",".join)
def test_only_parts_that_are_recomputed_are_not_kept_and_pass_in_whole(parts):
    plain = memory(load_config(["experiment=m"]), 1)
    chosen = ["trainer.activation_checkpointing=true", f"trainer.recomputed=[{','.join(parts)}]"]
    again = memory(load_config(["experiment=m", *chosen]), 1)
    less = {name: again.kept[name] < size for name, size in plain.kept.items()}
    more = {name: again.passing[name] > size for name, size in plain.passing.items()}
    attention, mlp = "attention" in parts, "mlp" in parts
    assert less == dict.fromkeys(less, False) | {"attention": attention, "experts": mlp, "dense MLP": mlp}
    assert more == {"head backward": False, "experts backward": mlp, "attention backward": attention}


# Stage 3; what small models really gather: tests/train/test_gathered.py -----------------------------------------------


def test_the_plan_of_stage_3_knows_deepspeeds_defaults():
    defaults = {field.alias: field.default for field in DeepSpeedZeroConfig.model_fields.values()}
    assert {key: defaults[key] for key in STAGE_3} == STAGE_3


def test_small_models_are_gathered_in_whole_and_large_ones_as_far_as_so_much_may_live():
    def elements(*words):
        config = load_config(["parallel=zero3", *words])
        return whole_weights(config), sum(p.numel() for p in meta_model(config).parameters())

    found, model = elements("experiment=r2")
    assert found == model
    found, model = elements("experiment=paper_27b")
    assert 1e9 < found < 1e9 + 72 * 3 * 2560 * 1536 + 1 < model / 10
    lean = "parallel.deepspeed={zero_optimization: {stage3_max_live_parameters: 0, stage3_max_reuse_distance: 0}}"
    assert elements("experiment=paper_27b", lean)[0] < found


def test_one_rank_gathers_nothing_that_it_has_but_gradients_and_what_is_on_its_host():
    config = load_config(["experiment=r2", "parallel=zero3", "trainer.dtype=bf16"])
    offloaded = load_config(["experiment=r2", "parallel=zero3", "trainer.dtype=bf16", "parallel.offload_params=cpu"])
    experts = 2 * 3 * config.moe.experts * config.moe.expert_width * config.model.width
    assert gathered(config, 1) == experts
    assert gathered(offloaded, 1) == gathered(config, 2) == experts + 2 * whole_weights(config)


@pytest.mark.parametrize("experiment", ["r2", "paper_27b"])
def test_gathered_weights_and_a_buckets_copy_are_parts_of_stage_3_only(experiment):
    second, third = (memory(load_config([f"experiment={experiment}", f"parallel=zero{n}"]), 8) for n in (2, 3))
    assert third.kept == {**second.kept, "gathered": third.kept["gathered"]}
    assert third.passing == {**second.passing, "gradients scattered": third.passing["gradients scattered"]}
    largest = {"r2": 200e6, "paper_27b": 72 * 2 * 2560 * 1536}[experiment]  # a bucket; gate_up of a layer's experts
    assert third.passing["gradients scattered"] == 4 * largest
    assert third.total == sum(third.states.values()) + sum(third.kept.values()) + max(third.passing.values())
