"""An export gets its name only once it was opened again and found to be the model that was trained."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from launch import SMALL, summary
from safetensors.torch import load_file, save_file

from nsa_train.config.load import load_config
from nsa_train.errors import NsaTrainError
from nsa_train.model.pretrained import NSATrainForCausalLM
from nsa_train.model.transformer import Transformer
from nsa_train.train import export


def write(folder, *words, dtype=torch.float32):
    """Export a model whose parameters all have a value, as after training, and give it."""
    config = load_config([*SMALL, *words])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer(config.model, config.attention, config.moe)
        for parameter in model.parameters():
            parameter.data.normal_(std=0.2)
    weights = {**dict(model.named_buffers()), **{name: x.data.to(dtype) for name, x in model.named_parameters()}}
    ended = []
    export.export_model(
        weights,
        config.model.rope_factor,
        config,
        folder / "tokenizer.model",
        folder / "export",
        lambda: ended.append(1),
    )
    assert len(ended) == 3  # written, opened, and the first model's logits: minutes each, of a large one
    return weights


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch):
    monkeypatch.setattr(export.Tokenizer, "load", lambda path: SimpleNamespace(eos=0))


def tamper(change):
    """`change` every folder right after it was written."""
    save = NSATrainForCausalLM.save_pretrained
    NSATrainForCausalLM.save_pretrained = lambda model, folder: (save(model, folder), change(folder))


def flip_one_bit(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.layers.1.mlp.down"].view(torch.int32)[3, 2, 1] ^= 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def name_other_positions(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model"]["rope_theta"] *= 2
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arm", ["nsa", "full", "window", "nsa_random", "nsa_no_slc", "nsa_shared_kv"])
def test_every_arm_is_the_same_when_it_is_opened_again(arm, dtype, tmp_path):
    weights = write(tmp_path, f"attention={arm}", dtype=dtype)
    found = load_file(tmp_path / "export" / "model.safetensors")
    assert torch.equal(found["transformer.embed.weight"], weights["embed.weight"])


def test_tied_embeddings_too(tmp_path):
    write(tmp_path, "model.tied_embeddings=true")
    assert (tmp_path / "export").is_dir()


def test_a_run_on_kernels_that_need_a_gpu_is_compared_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr("nsa_train.ops.nsa.INTERPRETED", False)
    write(tmp_path, "attention.backend=triton")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["attention"]["backend"] == "triton"


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        (flip_one_bit, torch.float32, r"1 of its tensors are not .*\n  transformer\.layers\.1\.mlp\.down$"),
        (name_other_positions, torch.float32, r"the logits of a row of 128 tokens are off by .* \(at most 0\.0001\)"),
        (name_other_positions, torch.bfloat16, r"the logits of a row of 128 tokens are off by .* \(at most 0\.02\)"),
    ],
)
def test_what_opens_as_another_model_is_refused_and_the_export_that_was_there_stays(
    change, dtype, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(NSATrainForCausalLM, "save_pretrained", NSATrainForCausalLM.save_pretrained)  # for its undoing
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "old").touch()
    tamper(change)
    with pytest.raises(NsaTrainError, match=message):
        write(tmp_path, dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert (tmp_path / "export" / "old").exists()


@pytest.mark.process
def test_random_blocks_of_the_runs_seed_are_in_its_checkpoints_and_its_export(train, tmp_path):
    words = ["attention=nsa_random", "seed=3"]
    job = train(*words, "trainer.export=true", "trainer.steps=3")
    assert job.wait() == 0, job.text
    config = load_config([*SMALL, *words])
    model = Transformer(config.model, config.attention, config.moe)
    model.start(config.seed)
    exported = load_file(tmp_path / "run" / "export" / "model.safetensors")
    saved = load_file(tmp_path / "run" / "checkpoints" / "step_3" / "buffers.safetensors")
    for number, layer in enumerate(model.layers):
        name = f"layers.{number}.attention.draw"
        assert layer.attention.draw > 0
        assert torch.equal(saved[name], layer.attention.draw)
        assert torch.equal(exported[f"transformer.{name}"], layer.attention.draw)


@pytest.mark.process
def test_a_run_whose_export_is_another_model_keeps_its_checkpoints_and_is_ended_later(train_ranks, tmp_path):
    def start(**how):
        jobs = train_ranks(2, "parallel=zero3", "trainer.export=true", "trainer.steps=3", **how)
        return [job.wait() for job in jobs], jobs[0].text

    codes, text = start(before=partial(tamper, flip_one_bit))
    run = tmp_path / "run"
    assert codes[0] == 2, text
    assert "of its tensors are not those that were written" in text
    assert "Traceback" not in text
    assert (summary(run)["status"], summary(run)["exit_code"], summary(run)["steps"]) == ("failed", 2, 3)
    assert not list(run.glob("*export*"))
    codes, text = start()
    assert codes == [0, 0], text
    assert (run / "export" / "model.safetensors").exists()
