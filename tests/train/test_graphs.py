"""Replayed passes are the passes themselves. A CPU has no CUDA graphs, so here work is done again into the same memory.

What only a GPU can show, that a recording holds all of a pass, is in tests/gpu/test_gpu_graphs.py.
"""

import gc
import weakref

import launch
import pytest
import torch

from nsa_train.config.load import load_config
from nsa_train.model import attention
from nsa_train.model.transformer import Transformer
from nsa_train.ops import flash4
from nsa_train.ops.dense import dense_attention
from nsa_train.packing import Packing
from nsa_train.train.graphs import RecordedPass, ReplayedPasses, replay_passes

TOKENS, DOCUMENTS, CHUNK = 96, 5, 40
PACKS = [(60, 36), (96,), (20, 30, 11, 35)]


class Again:
    """In place of a CUDA graph: the work is done again, and what it gives is copied to where it lay the first time."""

    def warm_up(self, work):
        work()

    def record(self, work):
        kept = work()

        def replay():
            with torch.enable_grad():
                for old, new in zip(kept, work(), strict=True):
                    old.copy_(new)

        return kept, replay


def small_model(*overrides):
    config = load_config([*launch.SMALL, *overrides])
    model = Transformer(config.model, config.attention, config.moe)
    model.start(0)
    return model


def micro_batch(lengths, seed=0, documents=DOCUMENTS):
    tokens = torch.randint(0, 400, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return tokens, tokens.roll(-1), Packing.from_lengths(lengths, documents)


def results(model, batch):
    """Outputs and gradients, copied: the next pass may write over them."""
    out = model(*batch, CHUNK)
    loss = out.token_losses.square().sum() + 1e-2 * out.balance
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [x.detach().clone() for x in (*out, *gradients)]


@pytest.mark.parametrize("arm", ["nsa", "nsa_no_win", "nsa_shared_kv", "nsa_random", "nsa_no_slc"])
def test_replayed_passes_give_the_bits_of_plain_ones_whatever_the_documents(arm):
    plain, replayed = (small_model(f"attention={arm}") for _ in range(2))
    replayed.forward = ReplayedPasses(replayed, Again)
    for seed, lengths in enumerate(PACKS):
        batch = micro_batch(lengths, seed)
        want, got = results(plain, batch), results(replayed, batch)
        assert want[0].abs().max() > 0
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("arm", ["full", "full_gated"])
def test_full_attention_is_replayed_on_a_kernel_that_reads_documents_on_the_device(arm, monkeypatch):
    def by_bounds(q, k, v, bounds):
        return dense_attention(q, k, v, [length for length in bounds.diff().tolist() if length])

    monkeypatch.setattr(attention, "recorded_attention", by_bounds)
    plain, replayed = (small_model(f"attention={arm}") for _ in range(2))
    replayed.forward = ReplayedPasses(replayed, Again)
    for seed, lengths in enumerate(PACKS):
        batch = micro_batch(lengths, seed)
        assert all(torch.equal(a, b) for a, b in zip(results(replayed, batch), results(plain, batch), strict=True))


def test_a_model_without_experts_is_replayed_though_its_balance_has_no_gradient():
    plain, replayed = (small_model("model.dense_layers=2") for _ in range(2))
    replayed.forward = ReplayedPasses(replayed, Again)
    for model in (plain, replayed):
        assert not model(*micro_batch(PACKS[0]), CHUNK).balance.requires_grad
    wanted = results(plain, micro_batch(PACKS[1]))
    assert all(torch.equal(a, b) for a, b in zip(results(replayed, micro_batch(PACKS[1])), wanted, strict=True))


def test_replayed_passes_see_weights_and_biases_that_changed_in_place():
    plain, replayed = small_model(), small_model()
    replayed.forward = ReplayedPasses(replayed, Again)
    results(replayed, micro_batch(PACKS[0]))
    for model in (plain, replayed):
        with torch.no_grad():
            model.layers[0].attention.q.weight.mul_(1.5)
        model.balance_experts(torch.arange(4.0).expand(len(model.routers()), 4))
    wanted = results(plain, micro_batch(PACKS[0]))
    assert all(torch.equal(a, b) for a, b in zip(results(replayed, micro_batch(PACKS[0])), wanted, strict=True))


def test_a_recording_keeps_away_from_what_autograd_knows_of_the_weights():
    """DeepSpeed keeps views of the weights, and with them nodes of autograd that belong to another stream."""
    seen, model = {}, small_model()

    class Looking(Again):
        def record(self, work):
            kept = super().record(work)
            pending = [x.grad_fn for x in work.__self__._live if x.requires_grad]
            while pending:
                node = pending.pop()
                pending += [following for following, _ in node.next_functions if following]
                if hasattr(node, "variable"):
                    seen[id(node.variable)] = node.variable
            return kept

    model.forward = ReplayedPasses(model, Looking)
    results(model, micro_batch((60, 36)))
    weights = list(model.parameters())
    assert {x.data_ptr() for x in seen.values()} == {weight.data_ptr() for weight in weights}
    assert not seen.keys() & {id(weight) for weight in weights}


def recordings(monkeypatch):
    """A list that receives of each recording how many earlier ones are still there when it begins."""
    begun, made, init = [], [], RecordedPass.__init__

    def noted(self, *args):
        gc.collect()
        begun.append(sum(ref() is not None for ref in made))
        made.append(weakref.ref(self))
        init(self, *args)

    monkeypatch.setattr(RecordedPass, "__init__", noted)
    return begun


def test_one_recording_serves_all_packs_of_a_shape_and_another_kind_takes_its_place(monkeypatch):
    begun, plain, model = recordings(monkeypatch), small_model(), small_model()
    model.forward = ReplayedPasses(model, Again)
    for lengths in PACKS:
        out = model(*micro_batch(lengths), CHUNK)
        out.token_losses.sum().backward()
    assert begun == [0]
    for lengths, documents, factor in (((60, 36), 7, 1.0), ((40,), 7, 1.0), ((40,), 7, 2.0)):
        plain.rope_factor = model.rope_factor = factor
        batch = micro_batch(lengths, documents=documents)
        wanted = results(plain, batch)
        assert all(torch.equal(a, b) for a, b in zip(results(model, batch), wanted, strict=True))
    assert begun == [0] * 4
    assert out.token_losses.grad_fn is not None  # an output that is still there keeps no recording


def test_passes_without_gradients_and_with_probes_are_not_recorded(monkeypatch):
    begun, model = recordings(monkeypatch), small_model()
    model.forward = ReplayedPasses(model, Again)
    with torch.no_grad():
        probes = []
        model(*micro_batch((20, 30)), CHUNK, probes)
    assert probes[0]["gates"]
    assert begun == []


def test_a_recorded_pass_has_no_lengths_that_a_replay_could_not_change(monkeypatch):
    monkeypatch.setattr(flash4, "kernels", lambda: None)
    model = small_model("attention=full")
    model.forward = ReplayedPasses(model, Again)
    with pytest.raises(RuntimeError, match="flash-attn-4 does not import"):
        model(*micro_batch(PACKS[0]), CHUNK)


def test_on_a_cpu_the_option_has_no_effect():
    model = small_model()
    assert "no effect here" in replay_passes(model, torch.device("cpu"))
    assert "forward" not in vars(model)


@pytest.mark.parametrize("found", [None, ("forward", "backward")])
@pytest.mark.parametrize(("arm", "width"), [("full", 64), ("full_gated", 16), ("nsa", 16)])
def test_full_attention_is_recorded_where_flash_attention_4_takes_its_widths(arm, width, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash4, "kernels", lambda: found)
    model = small_model(f"attention={arm}", f"model.key_dim={width}", f"model.value_dim={width}")
    said = replay_passes(model, torch.device("cuda"))
    if arm == "nsa" or (found and width == 64):
        assert said == "forward and backward passes are CUDA graphs from here on"
        assert isinstance(model.forward, ReplayedPasses)
    else:
        assert f"no effect here: full attention of widths {width}/{width} needs FlashAttention-4" in said
        assert "forward" not in vars(model)


# Whole runs -----------------------------------------------------------------------------------------------------------

BF16 = ["trainer.dtype=bf16", "moe.bias_rate=0.01", "trainer.on_spike=warn"]
STEP_TOKENS = 4 * 96
TWO_STAGES = [
    f"stages.parts.a={{tokens: {5 * STEP_TOKENS}, seq_len: 96, mixture: {{}}, rope_factor: 1.0}}",
    "stages.parts.b={tokens: null, seq_len: 192, mixture: {}, rope_factor: 2.0}",
]
PROFILED = ["profile.steps=1", "profile.skip=0"]


def stand_in():
    """Before a command: passes are done again instead of replayed."""
    from nsa_train.train import loop

    def replay(model, device):
        assert device.type == "cpu"
        model.forward = ReplayedPasses(model, Again)
        return "replayed from here on"

    loop.replay_passes = replay


@pytest.mark.process
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_with_replayed_passes_has_the_losses_and_weights_of_a_plain_one(world, train_ranks, tmp_path):
    for name, before in (("plain", None), ("replayed", stand_in)):
        words = [
            *BF16,
            *TWO_STAGES,
            *PROFILED,
            "trainer.micro_rows=1",
            f"name={name}",
            f"trainer.cuda_graphs={'auto' if name == 'replayed' else 'false'}",
        ]
        jobs = train_ranks(world, *words, before=before)
        assert [job.wait() for job in jobs] == [0] * world, "\n".join(job.text for job in jobs)
    assert "replayed from here on" in jobs[0].text
    plain, replayed = tmp_path / "plain", tmp_path / "replayed"
    assert launch.rows(replayed) == launch.rows(plain)
    last = f"checkpoints/step_{launch.STEPS}"
    wanted, found = (
        {name: data for name, data in launch.contents(run / last).items() if name.endswith(".safetensors")}
        for run in (plain, replayed)
    )
    assert len(wanted) > world
    assert found == wanted


@pytest.mark.parametrize(("words", "steps"), [([], 0), (["profile=trace"], 14), (PROFILED, 2)])
def test_replays_begin_after_the_profile(words, steps):
    assert load_config(words).profile.until_written == steps
