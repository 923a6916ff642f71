"""A recording holds all of a pass: replayed passes give the bits of plain ones, in a model and in a whole run."""

import json
import subprocess
import sys

import pytest
import torch

from nsa_train.config.load import load_config
from nsa_train.model.transformer import Transformer
from nsa_train.ops.dense import flash4_takes
from nsa_train.packing import Packing
from nsa_train.train.graphs import replay_passes

pytestmark = pytest.mark.gpu
TINY, HOPPER = ["experiment=tiny"], ["experiment=r1", "model.layers=2"]  # kernels in plain Triton, and those for Hopper
PACKS = [(700, 31, 1317), (2048,), (1, 900, 47, 600, 500)]
CHUNK = 1000
MEASURED = ("tokens_per_s", "data_wait_ms", "mem_gib")  # of the machine, not of the training


def on_gpu(config):
    model = Transformer(config.model, config.attention, config.moe)
    model.start(0)
    model.to("cuda", torch.bfloat16)
    for router in model.routers():
        router.bias = router.bias.float()
    return model


def micro_batch(config, lengths, documents=8):
    tokens = torch.randint(0, config.model.vocab, (sum(lengths),), device="cuda")
    return tokens, tokens.roll(-1), Packing.from_lengths(lengths, documents).to("cuda")


def results(model, batch):
    """Outputs and gradients, copied: the next pass may write over them."""
    out = model(*batch, CHUNK)
    loss = out.token_losses.sum() + 1e-2 * out.balance
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [x.detach().clone() for x in (*out, *gradients)]


@pytest.mark.parametrize(
    "words",
    [TINY, [*TINY, "attention.phi=gated_pool"], [*TINY, "attention.selection=none"],
     *([*TINY, f"attention={arm}"] for arm in ("nsa_no_slc", "nsa_no_win", "nsa_random", "nsa_shared_kv", "window")),
     HOPPER, *([*HOPPER, f"attention={arm}"] for arm in ("nsa_no_slc", "nsa_random", "window"))],
    ids=" ".join,
)  # fmt: skip
def test_replayed_passes_give_the_bits_of_plain_ones_whatever_the_documents(words):
    config = load_config([*words, "trainer.cuda_graphs=true"])
    plain, replayed = on_gpu(config), on_gpu(config)
    held = [weight.view_as(weight) for weight in replayed.parameters()]  # on this stream, as DeepSpeed keeps them
    replay_passes(replayed, torch.device("cuda"))
    for documents, factor in ((8, 1.0), (11, 1.0), (11, 2.0)):
        plain.rope_factor = replayed.rope_factor = factor
        for lengths in PACKS:
            batch = micro_batch(config, lengths, documents)
            want, got = results(plain, batch), results(replayed, batch)
            assert all(x.isfinite().all() for x in want)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            with torch.no_grad():
                assert torch.equal(replayed(*batch, CHUNK).token_losses, want[0])
        load = torch.rand(len(plain.routers()), config.moe.experts, device="cuda")
        for model in (plain, replayed):
            model.balance_experts(load)
    assert len(held) == len(list(plain.parameters()))


@pytest.mark.skipif(not flash4_takes(64, 64), reason="FlashAttention-4 is missing")
@pytest.mark.parametrize("arm", ["full", "full_gated"])
def test_replayed_full_attention_is_that_of_plain_passes_but_for_the_rounding_of_sums(arm):
    """Its backward kernel adds gradients in any order, and a recorded pass has empty documents at its end."""
    config = load_config([*HOPPER, f"attention={arm}", "trainer.cuda_graphs=true"])
    plain, replayed = on_gpu(config), on_gpu(config)
    replay_passes(replayed, torch.device("cuda"))
    for documents in (8, 300):
        for lengths in PACKS:
            batch = micro_batch(config, lengths, documents)
            want, got = results(plain, batch), results(replayed, batch)
            assert all(x.isfinite().all() for x in got)
            for ours, theirs in zip(got, want, strict=True):
                assert (ours - theirs).float().norm() <= 2e-2 * theirs.float().norm() + 1e-6


def test_replays_cost_the_host_less_than_launches():
    config = load_config([*TINY, "trainer.cuda_graphs=true"])
    plain, replayed = on_gpu(config), on_gpu(config)
    replay_passes(replayed, torch.device("cuda"))
    batch = micro_batch(config, PACKS[0])

    def calls(model):
        """Of CUDA's runtime and driver in a pass."""
        results(model, batch)
        with torch.profiler.profile() as profile:
            results(model, batch)
        return sum("Launch" in event.name for event in profile.events())

    assert calls(replayed) < calls(plain) / 3


def test_a_run_with_cuda_graphs_has_the_losses_and_weights_of_a_plain_one(tmp_path):
    stages = ["stages.parts.a={tokens: 12288, seq_len: 512, mixture: {}, rope_factor: 1.0}",  # three steps
              "stages.parts.b={tokens: null, seq_len: 1024, mixture: {}, rope_factor: 2.0}"]  # fmt: skip
    command = [sys.executable, "-m", "nsa_train", "train", "experiment=tiny", *stages, f"runs_dir={tmp_path}",
               f"data.prepared_dir={tmp_path}/data", "trainer.steps=6", "trainer.log_every=1", "trainer.val_every=2",
               "trainer.checkpoint_every=6", "trainer.export=false", "logging.wandb=disabled"]  # fmt: skip

    def outcome(name, *words):
        done = subprocess.run([*command, f"name={name}", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        rows = [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]
        files = sorted((tmp_path / name / "checkpoints" / "step_6").rglob("*.safetensors"))
        return done.stdout + done.stderr, rows, {path.name: path.read_bytes() for path in files}

    plain, graphs = outcome("plain"), outcome("graphs", "trainer.cuda_graphs=true")
    assert "CUDA graphs from here on" in graphs[0]
    assert "AccumulateGrad" not in graphs[0]  # PyTorch warns of gradients on another stream than their weights'
    assert len(plain[1]) == 6 + 4
    assert len(plain[2]) > 1
    assert graphs[1:] == plain[1:]
