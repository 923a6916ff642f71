"""What a run leaves behind, looked at in one run that was interrupted once and then ended."""

import json
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml
from launch import SMALL, Job, rows, signal, signal_at, summary
from transformers import AutoModelForCausalLM

import nsa_train.model.pretrained  # noqa: F401
from nsa_train.config.load import config_from_tree, load_config, to_tree
from nsa_train.data.loader import Loader
from nsa_train.data.prepare import prepare
from nsa_train.data.stages import stages_of
from nsa_train.data.store import TokenStore
from nsa_train.errors import RunFolderError
from nsa_train.model.transformer import Transformer
from nsa_train.packing import Packing
from nsa_train.train.evaluate import evaluate
from nsa_train.train.heldout import HeldOut, recall_distances
from nsa_train.train.optim import build_optimizer, lr_at

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def words(corpus, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    return [*SMALL, *corpus, f"runs_dir={runs}", "trainer.export=true", "logging.wandb=offline", "logging.tags=[a,b]"]


@pytest.fixture(scope="module")
def config(words):
    return load_config(words)


@pytest.fixture(scope="module")
def run(words, config):
    """The run folder, after an interruption in step 5 and a second launch."""
    outputs = config.run_dir.parent
    stop = partial(signal_at, "nsa_train.parallel.engine:Engine", "backward", 10, signal.SIGTERM)
    first = Job(["train", *words], outputs / "first", before=stop)
    assert first.wait() == 75, first.text
    second = Job(["train", *words], outputs / "second")
    assert second.wait() == 0, second.text
    return config.run_dir


@pytest.fixture(scope="module")
def prepared(config, run):
    return prepare(config.data, config.model.vocab, lambda line: None)


def loader(prepared, config, split):
    store = TokenStore.open(prepared, split)
    return Loader(store, stages_of(config), config.data, config.seed)


def trained(config, run):
    """The model of the last checkpoint, read from its pieces, which one process has whole."""
    from safetensors.torch import load_file

    folder = run / "checkpoints" / f"step_{config.trainer.steps}"
    shard = load_file(folder / "optimizer_00000.safetensors")
    model = Transformer(config.model, config.attention, config.moe)
    state = {name: shard[f"master/{name}"].view(values.shape) for name, values in model.named_parameters()}
    state |= load_file(folder / "buffers.safetensors")
    model.load_state_dict(state)
    return model


def test_it_has_the_files_that_readme_names(run):
    assert {path.name for path in run.iterdir() if not path.name.startswith(".") and path.name != "eval"} == {
        "metrics.jsonl", "summary.json", "loss.png", "checkpoints", "export", "config.yaml", "manifest.json",
        "deepspeed.json", "wandb", "heldout.npz",
    }  # fmt: skip
    assert (run / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_export_opens_with_the_logits_of_the_trained_model(run, config):
    opened, model = AutoModelForCausalLM.from_pretrained(run / "export").eval(), trained(config, run).eval()
    tokens = torch.randint(config.model.vocab, (2, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model.logits(tokens.flatten(), Packing.from_lengths([96, 96])).view(2, 96, -1)
        assert torch.equal(opened(tokens).logits, want)


def test_the_export_has_the_held_out_loss_that_the_run_reported(run, config, prepared):
    model = AutoModelForCausalLM.from_pretrained(run / "export").transformer
    found = evaluate_alone(model, loader(prepared, config, "heldout"), config)
    assert found["loss"] == summary(run)["val_loss_last"]
    assert (run / "export" / "tokenizer.model").read_bytes() == (prepared / "tokenizer.model").read_bytes()


def evaluate_alone(model, heldout, config):
    """`evaluate` without a process group."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nsa_train.train.evaluate.sum_over_ranks", lambda *tensors: None)
        return evaluate(model, heldout, config.trainer, ["even", "odd"], torch.device("cpu"))


def test_losses_are_those_of_a_plain_pytorch_loop(run, config, prepared):
    """Without DeepSpeed, accumulation, sharding, checkpoints: sums, one backward pass, clipping, AdamW."""
    model = Transformer(config.model, config.attention, config.moe)
    model.start(config.seed)
    optimizer = build_optimizer(model, config.optim)
    train, trainer = loader(prepared, config, "train"), config.trainer
    model.head.set_prior(torch.from_numpy(train.label_counts(trainer.steps, config.model.vocab)))
    for row in (row for row in rows(run) if row["split"] == "train"):
        step = row["step"] - 1
        (batch,) = train.micro_batches(step, 0, 1, trainer.batch_rows)
        out = model(batch.tokens, batch.labels, batch.packing, 10_000)
        loss = out.token_losses.sum() / (batch.labels >= 0).sum()
        (loss + config.moe.aux_weight * out.balance / len(batch.tokens)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, trainer.steps, config.optim.lr, config.schedule)
        optimizer.step()
        optimizer.zero_grad()
        model.balance_experts(out.load)
        assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        assert row["lr"] == optimizer.param_groups[0]["lr"]


def test_a_run_starts_from_the_frequencies_of_tokens(run):
    """Those of the few steps that it has, so near the entropy only."""
    first = next(row for row in rows(run) if row["split"] == "val")
    assert (first["step"], first["loss"]) == (0, pytest.approx(summary(run)["unigram_entropy"], abs=0.3))
    assert summary(run)["unigram_entropy"] < np.log(400) - 1


def test_the_losses_of_the_documents_add_up_to_the_reported_ones(run, prepared):
    found, store = HeldOut.load(run / "heldout.npz"), TokenStore.open(prepared, "heldout")
    last = [row for row in rows(run) if row["split"] == "val"][-1]
    loss, labels = found.position.sum((0, 1))
    assert (loss / labels, labels) == (pytest.approx(last["loss"]), last["val_tokens"])
    for bucket, (loss, labels) in enumerate(found.position.sum(0)):
        start, end = found.position_edges[bucket : bucket + 2]
        assert loss / labels == pytest.approx(last["by_position"][f"{start}-{end}"])
    for number, source in enumerate(found.sources):
        loss, labels = found.position[found.source == number].sum((0, 1))
        assert loss / labels == pytest.approx(last["by_source"][source])
    assert (found.source == store.sources[found.document]).all()
    assert len(found.document) > 2
    assert (found.position[..., 1].sum(1) < store.lengths[found.document]).all()  # a piece's last token has no label


@pytest.mark.process
def test_losses_by_document_can_be_of_other_rows_than_a_validation(train, tmp_path):
    assert train("trainer.steps=1", "trainer.heldout_rows=2", "model.head_prior=false").wait() == 0
    first, last = (row for row in rows(tmp_path / "run") if row["split"] == "val")
    assert first["loss"] == pytest.approx(np.log(400), abs=0.05)  # no prior: a guess among all tokens
    loss, labels = HeldOut.load(tmp_path / "run" / "heldout.npz").position.sum((0, 1))
    assert 0 < labels <= 2 * 96 < last["val_tokens"]
    assert np.isfinite(loss)


def test_recalled_labels_are_those_of_the_text(run, config, prepared):
    """Counted again document by document, for documents that one row holds whole."""
    found, store = HeldOut.load(run / "heldout.npz"), TokenStore.open(prepared, "heldout")
    assert found.recall_edges.tolist() == [0, 16, 32, 64, 96]
    whole = found.position[..., 1].sum(1) == store.lengths[found.document] - 1
    pieces = [store.tokens[a:b] for a, b in zip(store.offsets[:-1], store.offsets[1:], strict=True)]
    for number in np.flatnonzero(whole):
        distance = recall_distances(np.asarray(pieces[found.document[number]]))[:-1]
        counts = np.histogram(distance[distance > 0], found.recall_edges)[0]
        assert counts.tolist() == found.recall[number, :, 1].tolist()
    assert found.recall[..., 1].sum() > 20
    assert (found.recall[..., 0].sum(1) <= found.position[..., 0].sum(1) + 1e-9).all()


def test_a_run_without_losses_by_document_is_named(run, tmp_path):
    (tmp_path / "heldout.npz").write_bytes((run / "heldout.npz").read_bytes()[:100])
    with pytest.raises(RunFolderError, match=r"heldout\.npz: no held-out losses by document"):
        HeldOut.load(tmp_path / "heldout.npz")


def test_the_export_has_the_loss_of_the_same_labels_in_rows_of_each_length(run, prepared, tmp_path):
    job = Job(["eval", run, "task=heldout", "lengths=48,96", "samples=1"], tmp_path / "output")
    assert job.wait() == 0, job.text
    found = json.loads((run / "eval" / "heldout.json").read_text())["rows"]
    store, opened = TokenStore.open(prepared, "heldout"), AutoModelForCausalLM.from_pretrained(run / "export").eval()
    for row, buckets in zip(found, (["0-48"], ["0-96"]), strict=True):
        losses = []
        for begin, end in pairwise(store.offsets.tolist()):  # a sample is of 64k tokens, more than all of them
            tokens = torch.from_numpy(store.tokens[begin:end].astype(np.int64))
            with torch.no_grad():
                logits = torch.cat([opened(piece[None]).logits[0] for piece in tokens.split(row["length"])])
            losses.append(torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none").double())
        assert row["by_document"]["loss"] == pytest.approx([float(one.sum()) for one in losses], rel=1e-5)
        assert row["labels"] == len(store.tokens) - len(losses)
        assert row["loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
        assert list(row["by_position"]) == buckets


def test_the_export_is_asked_for_what_its_context_says(run, config, tmp_path):
    job = Job(["eval", run, "task=needle", "lengths=96", "depths=3", "samples=2"], tmp_path / "output")
    assert job.wait() == 0, job.text
    result = json.loads((run / "eval" / "needle.json").read_text())
    assert result["schema"] == "nsa-train/eval/1"
    grid = [row for row in result["rows"] if row["what"] == "cell"]
    assert [(row["length"], row["depth"], row["samples"]) for row in grid] == [(96, 0, 2), (96, 0.5, 2), (96, 1, 2)]
    assert all(0 <= row["selection_recall"] <= 1 for row in grid)
    (whole,) = (row for row in result["rows"] if row["what"] == "summary")
    assert whole["samples"] == 2 * sum(row["zone"] is None for row in grid)
    assert (run / "eval" / "needle.png").is_file()
    job = Job(["eval", run, "task=needle", "lengths=96", "depths=3", "samples=2", "words=train"], tmp_path / "trained")
    assert job.wait() == 0, job.text
    trained = json.loads((run / "eval" / "needle_train.json").read_text())["rows"]
    assert {row["task"] for row in trained} == {"needle_train"}
    assert (run / "eval" / "needle_train.png").is_file()
    assert json.loads((run / "eval" / "needle.json").read_text()) == result


def test_every_line_of_the_metrics_has_the_promised_keys(run, config):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = {
        "step", "tokens", "split", "loss", "lr", "grad_norm", "tokens_per_s", "data_wait_ms", "mem_gib", "load_peak",
        "dead_experts",
    }  # fmt: skip
    by_split = {split: [line for line in lines if line["split"] == split] for split in ("train", "val")}
    assert all(train <= set(line) for line in by_split["train"])
    assert all(1 <= peak <= config.moe.experts for line in by_split["train"] for peak in line["load_peak"])
    assert [line["step"] for line in by_split["train"]] == list(range(1, 13))
    assert [line["step"] for line in by_split["val"]] == [0, 4, 8, 12]
    assert all(line["tokens"] == line["step"] * 4 * 96 for line in lines)
    for line in by_split["val"]:
        assert set(line["by_source"]) <= {"even", "odd"}
        assert len(line["layers"]) == config.model.layers
        assert all(set(layer["gates"]) == {"cmp", "slc", "win"} for layer in line["layers"])


def test_the_summary_says_how_it_ended(run, prepared):
    found, manifest = summary(run), json.loads((prepared / "manifest.json").read_text())
    val = [row["loss"] for row in rows(run) if row["split"] == "val"]
    assert (found["status"], found["exit_code"], found["steps"], found["tokens"]) == ("done", 0, 12, 12 * 4 * 96)
    assert (found["val_loss_first"], found["val_loss_last"]) == (val[0], val[-1])
    assert found["val_loss_last"] < found["val_loss_first"] - 0.05
    assert (found["corpus_hash"], found["unigram_entropy"]) == (manifest["hash"], manifest["unigram_entropy"])
    assert found["params_total"] > found["params_active"] > 0
    assert found["tokens_per_s"] > 0
    assert found["wall_s"] > 0


def test_the_folder_says_what_was_run(run, config, prepared):
    assert config_from_tree(yaml.safe_load((run / "config.yaml").read_text())) == config
    manifest, engine = (json.loads((run / name).read_text()) for name in ("manifest.json", "deepspeed.json"))
    assert manifest["corpus"]["hash"] == json.loads((prepared / "manifest.json").read_text())["hash"]
    assert (manifest["world_size"], manifest["cuda_graphs"]) == (1, False)
    near, far = manifest["corpus"]["share_past"].items()
    assert (near[0], far[0]) == ("32", "64")
    assert 0 < far[1] < near[1] < 1
    assert manifest["corpus"]["epochs"].keys() == {"even", "odd"}
    assert len(manifest["common_weights_sha256"]) == 64
    assert engine["train_batch_size"] == config.trainer.batch_rows
    assert "optimizer" not in engine  # DeepSpeed would compile its own at run time


WANDB_KEYS = (
    "train/loss", "val/loss", "val_by_position/0-96", "val_by_source/odd", "gates/layer_0_cmp", "experts/layer_1",
    "experts/layer_1_peak", "experts/layer_1_dead", "selection/layer_1_", "common/layer_1", "trainer/step", "tokens",
    "corpus_hash",
)  # fmt: skip


def test_wandb_gets_the_metrics_offline_and_the_same_run_goes_on_after_the_interruption(run):
    run_id = json.loads((run / "manifest.json").read_text())["wandb_id"]
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(folder.name.endswith(f"-{run_id}") for folder in folders)
    records = [(folder / f"run-{run_id}.wandb").read_bytes() for folder in folders]
    assert [key for key in WANDB_KEYS for record in records if key.encode() not in record] == []
    assert b"experts/layer_0" not in b"".join(records)  # its MLP is dense


def test_an_expert_is_dead_that_had_no_token_since_the_last_log_step(train, tmp_path):
    def dead(every):
        job = train("moe.experts=256", "trainer.steps=3", f"trainer.log_every={every}", f"name=every_{every}")
        assert job.wait() == 0, job.text
        return [row["dead_experts"][0] for row in rows(tmp_path / f"every_{every}") if row["split"] == "train"]

    (together,), apart = dead(3), dead(1)
    assert 0 <= together < min(apart)


def test_arms_of_one_seed_start_from_the_same_common_weights_and_differ_in_the_named_keys(train, run, config, tmp_path):
    job = train("attention=full", "name=full", "trainer.steps=1")
    assert job.wait() == 0, job.text
    hashes = [
        json.loads((folder / "manifest.json").read_text())["common_weights_sha256"]
        for folder in (run, tmp_path / "full")
    ]
    assert hashes[0] == hashes[1]
    full, nsa = (
        json.loads((folder / "manifest.json").read_text())["initial_weights_sha256"]
        for folder in (tmp_path / "full", run)
    )
    assert full.items() < nsa.items()
    full = yaml.safe_load((tmp_path / "full" / "config.yaml").read_text())["attention"]
    assert {key for key in full if full[key] != to_tree(config)["attention"][key]} == {"branches", "gate"}


def test_forced_balance_is_said_and_gives_every_expert_as_many_tokens(train, tmp_path):
    job = train("trainer.force_balance=true", "trainer.steps=2", "trainer.log_every=1")
    assert job.wait() == 0, job.text
    assert job.text.count("routing is not learned") == 1
    peaks = [peak for row in rows(tmp_path / "run") if row["split"] == "train" for peak in row["load_peak"]]
    assert peaks
    assert max(peaks) < 1.02
