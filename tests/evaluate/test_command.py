"""`nsa-train eval` for blocks and maps: files beside one another, and one message where it cannot be asked."""

import copy
import json
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nsa_train.bench.trained import TrainedBlocks
from nsa_train.cli import main
from nsa_train.config.load import load_config, to_yaml
from nsa_train.data.prepare import prepare
from nsa_train.data.store import TokenStore
from nsa_train.data.tokenizer import Tokenizer
from nsa_train.errors import Interrupted
from nsa_train.evaluate import command
from nsa_train.evaluate.grid import Answer
from nsa_train.model.branches import spec_of
from nsa_train.model.pretrained import NSATrainConfig, NSATrainForCausalLM
from nsa_train.model.transformer import Transformer

SMALL = [
    "model.vocab=400", "model.layers=2", "model.width=32", "model.heads=4", "model.kv_heads=2", "model.key_dim=16",
    "model.value_dim=16", "moe.experts=4", "moe.expert_width=16", "attention.cmp_block=8", "attention.cmp_stride=4",
    "attention.slc_block=8", "attention.slc_count=4", "attention.window=16", "trainer.seq_len=256", "data=files",
    "data.paths=[text.txt]", "data.heldout_paths=[held.txt]", "model.max_seq_len=512",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus whose held-out document is longer than two rows."""
    root, library = tmp_path_factory.mktemp("corpus"), Path(sysconfig.get_path("stdlib"))
    for name, module in (("text.txt", "heapq"), ("held.txt", "csv")):
        (root / name).write_text((library / f"{module}.py").read_text("utf-8")[:12000])
    return [f"data.root={root}", f"data.prepared_dir={root / 'prepared'}"]


@pytest.fixture
def make_run(tmp_path, corpus, monkeypatch):
    """The folder of a run as `eval` sees it; its model is that of the first step."""

    def make(*overrides):
        config = load_config([*SMALL, *corpus, *overrides])
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        model = Transformer(config.model, config.attention, config.moe).eval()
        model.start(0)
        monkeypatch.setattr(command, "opened", lambda folder: (copy.deepcopy(model), None))
        return tmp_path, config

    return make


def test_quizzes_hide_facts_in_real_text_only(tmp_path):
    """Held-out documents that ask for facts themselves are no haystack, whatever the configuration says of them."""
    words = [
        "data.sources.text={kind: files, paths: [a.txt, b.txt, c.txt], heldout_share: 0.5}", "model.vocab=400",
        "data.sources.recall={kind: recall, paths: [train], take: 30, min_chars: 900, max_chars: 4000}",
        "data.sources.recall.haystack=[text]", f"data.root={tmp_path}", f"data.prepared_dir={tmp_path}/prepared",
    ]  # fmt: skip
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("".join(f"    line {i} of text {name}\n" for i in range(300)))
    config = load_config(words)
    folder = prepare(config.data, config.model.vocab, print)
    store = TokenStore.open(folder, "heldout")
    asks = store.sources == store.manifest["sources"].index("recall")
    assert asks.any()
    texts = list(command.real_texts(store, Tokenizer.load(store.tokenizer), 10_000))
    assert len(texts) == (~asks).sum() > 0
    assert all(line.startswith("    line ") for text in texts for line in text.rstrip("\n").split("\n"))


def rows(folder, task):
    return json.loads((folder / "eval" / f"{task}.json").read_text())["rows"]


def test_weights_in_bf16_are_computed_in_fp32_on_a_cpu(tmp_path, monkeypatch):
    config = load_config(SMALL)
    saved = NSATrainForCausalLM(NSATrainConfig.of(config.model, config.attention, config.moe)).bfloat16()
    saved.save_pretrained(tmp_path / "export")
    monkeypatch.setattr(command.Tokenizer, "load", lambda path: None)
    monkeypatch.setattr(command.runtime, "device", lambda: torch.device("cpu"))
    model, _ = command.opened(tmp_path)
    for name, value in saved.transformer.state_dict().items():
        got = model.state_dict()[name]
        assert torch.equal(got, value.to(got.dtype)), name
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_blocks_are_counted_at_every_length_and_kept_of_the_longest(make_run):
    folder, config = make_run("attention=nsa")
    assert main(["eval", str(folder), "task=blocks", "lengths=256,16,64", "samples=3"]) == 0
    found = [row for row in rows(folder, "blocks") if row["what"] == "selection"]
    assert [row["length"] for row in found] == [64, 256]  # rows of 16 choose nothing
    assert [row["tokens"] for row in found] == [3 * 64, 3 * 256]
    for row in found:
        assert row["best_recall"] >= max(row["selection_recall"], row["random_recall"])
        assert min(row["selection_recall"], row["random_recall"]) >= row["forced_recall"] > 0
    assert len([row for row in rows(folder, "blocks") if row["what"] == "head"]) == 2 * 2 * 2
    kept = TrainedBlocks.load(folder / "eval" / "blocks.npz", spec_of(config.attention))
    assert kept.blocks.shape == (2, 3 * 256, 2, 4)
    assert (folder / "eval" / "blocks.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("arm", ["nsa", "full", "nsa_random", "full_gated"])
def test_maps_are_drawn_of_arms_that_have_all_keys(arm, make_run, monkeypatch):
    folder, _ = make_run(f"attention={arm}")
    seen = []
    monkeypatch.setattr(command, "plot_maps", lambda found, title, path: seen.extend([*found, title, path]))
    assert main(["eval", str(folder), "task=maps", "samples=2"]) == 0
    first, second, title, path = seen
    drawn = arm.startswith("nsa")
    assert [(first.chosen is not None), (second.chosen is not None)] == [drawn] * 2
    assert first.maps.shape == (3, 256, 256)
    assert ("selected branch" in title, path) == (drawn, folder / "eval" / "maps.png")
    assert [(row["what"], row["layer"], row["length"]) for row in rows(folder, "maps")] == [
        ("map", 0, 256),
        ("map", 1, 256),
    ]


def test_several_tasks_see_the_model_as_it_was_trained(make_run):
    """A task stretches positions for its lengths; the next one begins with the run's own. Maps: the longest rows."""
    folder, _ = make_run("attention=nsa", "model.rope_trained_len=128")
    together = {}
    assert main(["eval", str(folder), "task=blocks,heldout,maps", "lengths=256,512", "samples=2"]) == 0
    for task in ("blocks", "heldout", "maps"):
        together[task] = rows(folder, task)
        assert main(["eval", str(folder), f"task={task}", "lengths=256,512", "samples=2"]) == 0
        assert rows(folder, task) == together[task], task
    assert [row["rope_factor"] for row in together["heldout"]] == [1, 4]
    assert {row["length"] for row in together["maps"]} == {512}


def test_answers_at_further_lengths_are_added(make_run):
    folder, config = make_run("attention=nsa")

    def asked(*words):
        assert main(["eval", str(folder), "task=heldout,blocks", *words]) == 0
        return [(row["length"], row["settings"]["samples"]) for row in rows(folder, "heldout")], {
            row["length"] for row in rows(folder, "blocks")
        }

    assert asked("lengths=64,256", "samples=2") == ([(64, 2), (256, 2)], {64, 256})
    kept = (folder / "eval" / "blocks.npz").read_bytes()
    whole = rows(folder, "heldout")
    assert asked("lengths=128,64", "samples=2") == ([(256, 2), (128, 2), (64, 2)], {64, 128, 256})
    assert rows(folder, "heldout")[0] == whole[1]
    assert rows(folder, "heldout")[2] == whole[0]
    assert (folder / "eval" / "blocks.npz").read_bytes() == kept  # still of the longest
    assert asked("lengths=128", "samples=1") == ([(128, 1)], {128})
    assert TrainedBlocks.load(folder / "eval" / "blocks.npz", spec_of(config.attention)).blocks.shape[1] == 128


def test_maps_and_answers_of_before_are_replaced_as_a_whole(make_run, caplog):
    folder, _ = make_run("attention=nsa")
    assert main(["eval", str(folder), "task=maps", "lengths=256", "samples=1"]) == 0
    assert main(["eval", str(folder), "task=maps", "lengths=64", "samples=1"]) == 0
    assert {row["length"] for row in rows(folder, "maps")} == {64}
    assert "maps.json: asked with length=64 (256 before), so earlier answers are replaced as a whole" in caplog.text
    before = {"rows": [{"what": "summary", "task": "heldout", "length": 16, "loss": 3.0}]}
    (folder / "eval" / "heldout.json").write_text(json.dumps(before))
    assert main(["eval", str(folder), "task=heldout", "lengths=64", "samples=1"]) == 0
    assert [row["length"] for row in rows(folder, "heldout")] == [64]
    assert "heldout.json: asked with samples=1 (unknown before), corpus_hash=" in caplog.text


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"rows": null}', '{"rows": [3]}', '{"rows": [{"task": "x"}]}'])
def test_a_damaged_answer_is_named_before_anything_is_asked(content, make_run, capsys, monkeypatch):
    folder, _ = make_run("attention=nsa")
    monkeypatch.setattr(command, "opened", None)
    (folder / "eval").mkdir()
    (folder / "eval" / "heldout.json").write_text(content)
    assert main(["eval", str(folder), "task=blocks,heldout"]) == 2
    assert f"{folder / 'eval' / 'heldout.json'}: no answer of `nsa-train eval`" in capsys.readouterr().err
    assert (folder / "eval" / "heldout.json").read_text() == content


def test_a_file_in_place_of_the_answers_folder_is_told_before_anything_is_asked(make_run, capsys, monkeypatch):
    folder, _ = make_run("attention=nsa")
    monkeypatch.setattr(command, "opened", None)
    (folder / "eval").write_text("mine")
    assert main(["eval", str(folder), "task=blocks"]) == 2
    assert f"error: {folder / 'eval'}: a file, where answers have their folder; move it" in capsys.readouterr().err


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", cut),
        ("model.safetensors", lambda file: file.write_bytes(b"")),
        ("model.safetensors", Path.unlink),
        ("config.json", cut),
        ("config.json", lambda file: file.write_text("{}")),
        ("config.json", lambda file: file.write_text("3")),
        ("config.json", lambda file: file.write_text(file.read_text().replace('"width": 32', '"width": 64'))),
        ("config.json", lambda file: file.write_text(file.read_text().replace('"width": 32', '"width": "x"'))),
        ("config.json", lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), "attention": 3}))),
    ],
)
def test_a_damaged_export_is_one_message(name, damage, tmp_path, capsys):
    config = load_config(SMALL)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    export = tmp_path / "export"
    NSATrainForCausalLM(NSATrainConfig.of(config.model, config.attention, config.moe)).save_pretrained(export)
    before = (export / name).read_bytes()
    damage(export / name)
    assert not (export / name).exists() or (export / name).read_bytes() != before
    assert main(["eval", str(tmp_path), "task=blocks"]) == 2
    said = capsys.readouterr().err
    assert f"error: {export}: is damaged (" in said
    assert "copy it from where it is whole, or train and export again" in said


@pytest.mark.parametrize("task", ["needle", "heldout"])
def test_answered_lengths_stay_when_the_rest_is_stopped(task, make_run, monkeypatch):
    """And when the same command, asked again, is stopped before it comes to them."""
    folder, _ = make_run("attention=nsa")
    asked, stop = [], []

    def answered(*_):
        asked.append(task)
        if len(asked) in stop:
            raise Interrupted("stopped")
        return [Answer(True, 1.0, None, None, 0, 0)]

    losses = command.losses_in_rows
    monkeypatch.setattr(command, "answers", answered)
    monkeypatch.setattr(command, "losses_in_rows", lambda *of: answered() and losses(*of))
    monkeypatch.setattr(command, "real_texts", lambda *_: [])
    monkeypatch.setattr(command, "Quizzes", lambda *_: SimpleNamespace(documents=lambda *_: []))

    def lengths(stopped_at):
        stop[:], asked[:] = [stopped_at], []
        words = [f"task={task}", "lengths=64,128,256", "depths=1", "samples=1"]
        assert main(["eval", str(folder), *words]) == (75 if stopped_at else 0)
        return sorted(row["length"] for row in rows(folder, task) if row["what"] == "summary")

    assert lengths(3) == [64, 128]
    assert lengths(2) == [64, 128]
    assert lengths(None) == [64, 128, 256]
    assert (folder / "eval" / "needle.png").exists() == (task == "needle")


@pytest.mark.parametrize(
    ("arm", "words", "message"),
    [
        (
            "full",
            ["task=blocks"],
            "of the arm full, and task=blocks needs a branch that selects blocks, which",
        ),
        ("nsa_no_slc", ["task=blocks"], "which branches=[cmp,win] has not"),
        ("nsa_random", ["task=blocks"], "needs blocks that the model chooses, not selection=random"),
        ("window", ["task=maps"], "needs a branch with a key for every token before, which branches=[win] has not"),
        ("nsa", ["task=maps,leaves"], "task=leaves is no task; say task= some of needle,"),
        ("nsa", [], "task= is no task; say task= some of needle,"),
        ("full", ["task=maps,blocks"], "of the arm full, and task=blocks needs a branch that selects blocks, which"),
        ("nsa", ["task=maps", "lengths=513"], "lengths=513 is beyond the model's max_seq_len=512"),
        ("nsa", ["task=blocks", "lengths=32"], "first 20 held-out rows is longer than n l' = 32 tokens"),
    ],
)
def test_what_cannot_be_asked_is_one_message(arm, words, message, make_run, capsys):
    folder, _ = make_run(f"attention={arm}")
    assert main(["eval", str(folder), *words]) == 2
    assert message in capsys.readouterr().err
