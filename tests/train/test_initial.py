"""A run may start with the weights of another one, or of an export, and says what it did not find there."""

import contextlib
import hashlib
import json
import shutil
from functools import partial

import pytest
import torch
from launch import SMALL, rows, signal, signal_at, summary
from safetensors.torch import load_file

from nsa_train.config.load import load_config
from nsa_train.errors import NsaTrainError
from nsa_train.model.transformer import Transformer
from nsa_train.train.initial import locate, origin_of, take_weights


@pytest.fixture(scope="module")
def exported(start_run, tmp_path_factory):
    """Folder of a run of four steps with an export; fp32, so that both hold the same numbers."""
    folder = tmp_path_factory.mktemp("exported")
    job = start_run(folder, "trainer.export=true", "trainer.steps=4", "moe.bias_rate=0.05")
    assert job.wait() == 0, job.text
    return folder / "run"


def model(*overrides):
    config = load_config([*SMALL, *overrides])
    made = Transformer(config.model, config.attention, config.moe)
    made.start(seed=7)
    return made


def taken(folder, *overrides):
    made = model(*overrides)
    with contextlib.ExitStack() as files:
        values, lines = take_weights(made, locate(folder), files)
        for name, read in values.items():
            made.get_parameter(name).data.copy_(read())
    return made, lines


@pytest.mark.process
@pytest.mark.parametrize("place", ["", "export", "checkpoints/step_4"])
def test_a_run_starts_where_the_other_ended(place, exported, train, tmp_path):
    """Held-out loss too, which a router bias that was left behind would change."""
    job = train(f"init_from={exported / place}", "seed=0", "trainer.steps=1", "optim.lr=1e-3")
    assert job.wait() == 0, job.text
    assert f"starting from the weights of {exported}" in job.text
    assert "not found there" not in job.text
    origin = json.loads((tmp_path / "run" / "manifest.json").read_text())["origin"]
    first = json.loads((exported / "manifest.json").read_text())
    kept = ("rows_fingerprint", "rows_sample_sha256", "initial_weights_sha256", "origin")
    facts = {key: first[key] for key in kept}
    assert len(facts["rows_sample_sha256"]) == 64
    assert origin == {"folder": str(exported / (place or "checkpoints/step_4")), "step": 4, **facts}
    found = [row for row in rows(tmp_path / "run") if row["split"] == "val"]
    assert found[0]["step"] == 0
    assert found[0]["loss"] == summary(exported)["val_loss_last"]


@pytest.mark.process
@pytest.mark.parametrize("place", ["", "export"])
def test_ranks_that_hold_parts_start_there_too(place, exported, train_ranks, tmp_path):
    jobs = train_ranks(2, f"init_from={exported / place}", "parallel=zero3", "seed=0", "trainer.steps=1")
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].text
    hashes = json.loads((tmp_path / "run" / "manifest.json").read_text())["initial_weights_sha256"]
    weights = load_file(exported / "export" / "model.safetensors")
    for name, sha256 in hashes.items():
        values = weights[f"transformer.{name.partition(' ')[0]}"]
        assert sha256 == hashlib.sha256(values.numpy()).hexdigest(), name
    found = [row for row in rows(tmp_path / "run") if row["split"] == "val"]
    assert found[0]["loss"] == pytest.approx(summary(exported)["val_loss_last"], rel=1e-6)


@pytest.mark.process
def test_a_run_that_took_weights_goes_on_after_they_are_gone(exported, train, tmp_path):
    shutil.copytree(exported, tmp_path / "source")
    words = [f"init_from={tmp_path / 'source'}", "trainer.steps=6"]
    killed = partial(signal_at, "nsa_train.parallel.engine:Engine", "backward", 9, signal.SIGKILL)
    assert train(*words, "name=undisturbed").wait() == 0
    assert train(*words, before=killed).wait() == -9
    hashes = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("run", "undisturbed")]
    for key in ("common_weights_sha256", "origin"):
        assert hashes[0][key] == hashes[1][key]
    shutil.rmtree(tmp_path / "source")
    job = train(*words)
    assert job.wait() == 0, job.text
    assert rows(tmp_path / "run") == rows(tmp_path / "undisturbed")


@pytest.mark.process
def test_a_run_without_checkpoints_is_its_export(exported, tmp_path):
    run = shutil.copytree(exported, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    assert locate(run) == run / "export"
    assert origin_of(run / "export")["step"] == 4
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["origin"], manifest["rows_sample_sha256"]  # as of older runs
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert origin_of(run / "export")["rows_fingerprint"] == manifest["rows_fingerprint"]
    (run / "summary.json").write_text('{"status": "stopped", "steps": 2}')
    assert origin_of(run / "export") == {"folder": str(run / "export")}
    elsewhere = shutil.copytree(run / "export", tmp_path / "elsewhere" / "export")
    assert origin_of(elsewhere) == {"folder": str(elsewhere)}


@pytest.mark.process
@pytest.mark.parametrize("place", ["", "export"])
def test_another_arm_takes_what_it_shares_and_names_the_rest(place, exported):
    full, lines = taken(exported / place, "attention=full")
    assert len(lines) == 2
    assert "layers.*.attention.gate.weight (2)" in lines[1]
    assert "layers.*.attention.kv.win.k.weight (2)" in lines[1]
    nsa, lines = taken(exported / place)
    assert len(lines) == 1
    assert f"{len(nsa.state_dict())} of {len(nsa.state_dict())} tensors" in lines[0]
    assert all(torch.equal(value, nsa.state_dict()[name]) for name, value in full.state_dict().items())
    afresh = model("attention=full").state_dict()
    assert not torch.equal(afresh["layers.1.mlp.down"], full.state_dict()["layers.1.mlp.down"])


@pytest.mark.process
def test_a_larger_model_says_what_starts_afresh(exported):
    larger, lines = taken(exported, "model.layers=3")
    assert "not found there, they start afresh: layers.*.attention.gate.bias, " in lines[1]
    fresh = model("model.layers=3").state_dict()
    assert torch.equal(larger.state_dict()["layers.2.attention.q.weight"], fresh["layers.2.attention.q.weight"])


@pytest.mark.process
@pytest.mark.parametrize("place", ["", "export"])
def test_another_model_is_refused_with_the_shapes(place, exported):
    with pytest.raises(
        NsaTrainError, match=r"(?s)holds another model.*\n  layers.1.mlp.down: \[4, 16, 32\] there, \[4, 8, 32\]"
    ):
        taken(exported / place, "moe.expert_width=8")


@pytest.mark.process
def test_a_folder_that_holds_no_weights_is_refused(train, tmp_path):
    (tmp_path / "empty").mkdir()
    job = train(f"init_from={tmp_path / 'empty'}")
    assert job.wait() == 2
    assert f"init_from={tmp_path / 'empty'} is no run with a checkpoint, no checkpoint and no export" in job.text
    assert "Traceback" not in job.text


@pytest.mark.process
def test_a_damaged_source_is_refused(exported, tmp_path):
    source = shutil.copytree(exported, tmp_path / "source")
    (source / "export" / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(NsaTrainError, match="export cannot be read"):
        taken(source / "export")
    for path in (source / "checkpoints").glob("step_*"):
        (path / "buffers.safetensors").unlink()
    with pytest.raises(NsaTrainError, match=r"no checkpoint and no export; .* is damaged, .*export is not; name"):
        taken(source)
    shutil.rmtree(source / "export")
    with pytest.raises(NsaTrainError, match=r"no checkpoint and no export; .* is damaged; name"):
        taken(source)
