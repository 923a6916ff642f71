"""Claims about long preparations: parallel, killed, resumed, short of disk, they all end in the same corpus."""

import dataclasses
import errno
import gzip
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import documents

from nsa_train.data import shards, streams
from nsa_train.data.prepare import _lock, prepare
from nsa_train.data.selection import SPLITS
from nsa_train.data.store import TokenStore
from nsa_train.data.tokenizer import Tokenizer
from nsa_train.errors import DataError, Interrupted, StorageError

VOCAB = 400
SMALL_SHARD = 20_000


@pytest.fixture
def corpus(data_config, module_texts):
    """A DataConfig of the twelve modules, three of them held out."""
    data = data_config(heldout_share=0.3, workers=1)
    with open(f"{data.root}/corpus.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in module_texts.values())
    return data


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_CHARACTERS", SMALL_SHARD)


def elsewhere(data, **fields):
    return dataclasses.replace(data, prepared_dir=data.prepared_dir + "-undisturbed", **fields)


def contents(folder):
    """Everything but the timings, by name."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "preparation.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_shards_cut_documents_anywhere_and_the_corpus_is_the_same(corpus, monkeypatch):
    whole = contents(prepare(elsewhere(corpus), VOCAB, print))
    monkeypatch.setattr(shards, "SHARD_CHARACTERS", 3000)
    lines = []
    assert contents(prepare(corpus, VOCAB, lines.append)) == whole
    assert "manifest.json" in whole


@pytest.mark.usefixtures("small_shards")
def test_two_processes_give_the_corpus_of_one(corpus):
    one = prepare(corpus, VOCAB, print)
    lines = []
    two = prepare(elsewhere(corpus, workers=2), VOCAB, lines.append)
    assert contents(one) == contents(two)
    assert json.loads((two / "preparation.json").read_text())["workers"] == 2
    assert re.search(r"tokens/s a core, peak memory .* in each of 2 workers", lines[-1])


KILLED = """
import json, sys
from nsa_train.config.data_schema import DataConfig
from nsa_train.data import shards
from nsa_train.data.prepare import _lock, prepare
if __name__ == "__main__":
    shards.SHARD_CHARACTERS = int(sys.argv[1])
    fields = json.loads(sys.argv[2])
    lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
    print(prepare(DataConfig(**(fields | lists)), int(sys.argv[3]), print), flush=True)
"""


def start(data, tmp_path, kill_at=None):
    script = tmp_path / "preparing.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(SMALL_SHARD), json.dumps(dataclasses.asdict(data)), str(VOCAB)]
    environment = os.environ | ({"NSA_TRAIN_KILL_AT": kill_at} if kill_at else {})
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("workers", "kill_at"), [(1, "prepare.shard"), (2, "prepare.shard"), (1, "shard.write")])
@pytest.mark.usefixtures("small_shards")
def test_after_a_kill_finished_shards_are_kept_and_half_written_ones_redone(workers, kill_at, corpus, tmp_path):
    undisturbed = contents(prepare(elsewhere(corpus), VOCAB, print))
    killed = start(dataclasses.replace(corpus, workers=workers), tmp_path, kill_at)
    killed.communicate(timeout=100)
    assert killed.returncode == -signal.SIGKILL
    (site,) = (tmp_path / "prepared").iterdir()
    kept = {path.name: path.stat().st_mtime_ns for path in (site / "shards").glob("*.npy")}
    assert bool(kept) == (kill_at == "prepare.shard")
    if kill_at == "shard.write":
        assert [path.suffix for path in (site / "shards").iterdir()] == [".tmp"]
    seen = {}

    def look(line):
        if site.exists():
            seen.update({path.name: path.stat().st_mtime_ns for path in (site / "shards").glob("*.npy")})

    lines = []
    folder = prepare(corpus, VOCAB, lambda line: (look(line), lines.append(line)))
    assert contents(folder) == undisturbed
    assert json.loads((folder / "preparation.json").read_text())["shards_found"] == len(kept)
    assert kept.items() <= seen.items()
    assert not any("reading" in line or "training" in line for line in lines)
    assert [path.name for path in (tmp_path / "prepared").iterdir()] == [folder.name]


def test_shards_of_other_text_are_not_taken(corpus, tmp_path, monkeypatch):
    undisturbed = contents(prepare(elsewhere(corpus), VOCAB, print))
    killed = start(corpus, tmp_path, "prepare.shard")  # with shards of SMALL_SHARD characters
    killed.communicate(timeout=100)
    monkeypatch.setattr(shards, "SHARD_CHARACTERS", SMALL_SHARD // 2)
    folder = prepare(corpus, VOCAB, print)
    assert contents(folder) == undisturbed
    assert json.loads((folder / "preparation.json").read_text())["shards_found"] == 0


def test_a_worker_that_is_killed_is_reported_and_the_same_command_goes_on(corpus, tmp_path, monkeypatch, small_shards):
    monkeypatch.setenv("NSA_TRAIN_KILL_AT", "shard.write")  # read by the workers, which die at their first shard
    with pytest.raises(Interrupted, match=r"the same command goes on.*data\.workers=1"):
        prepare(dataclasses.replace(corpus, workers=2), VOCAB, print)
    monkeypatch.delenv("NSA_TRAIN_KILL_AT")
    assert TokenStore.open(prepare(corpus, VOCAB, print), "train")


def test_workers_end_with_their_parent(corpus, tmp_path):
    preparing = start(dataclasses.replace(corpus, workers=2), tmp_path, "prepare.shard")
    preparing.communicate(timeout=100)  # ends when nobody holds the pipe any more: the workers inherited it
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        group = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        if str(tmp_path) not in group and f"parent_pid={preparing.pid}" not in group:
            return
        time.sleep(0.1)
    pytest.fail("workers outlive their parent")


@pytest.mark.usefixtures("small_shards")
def test_a_full_disk_is_told_and_nothing_half_written_is_taken_for_whole(corpus, monkeypatch):
    undisturbed = contents(prepare(elsewhere(corpus), VOCAB, print))
    save, written = np.save, []

    def full(file, array):
        save(file, array)
        written.append(array)
        if len(written) == 9:  # in the middle of the third shard
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(StorageError, match=r"cannot be written \(No space left on device\); make room"):
        prepare(corpus, VOCAB, print)
    monkeypatch.setattr(np, "save", save)
    folder = prepare(corpus, VOCAB, print)
    assert contents(folder) == undisturbed
    assert json.loads((folder / "preparation.json").read_text())["shards_found"] >= 2


@pytest.mark.parametrize(("fails", "problem"), [(True, "Input/output error"), (False, "ends inside its gz data")])
def test_after_a_failed_read_finished_shards_are_kept(fails, problem, corpus, tmp_path, monkeypatch):
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress((tmp_path / "corpus.jsonl").read_bytes()))
    data = dataclasses.replace(corpus, paths=("corpus.jsonl.gz",))
    undisturbed = contents(prepare(elsewhere(data), VOCAB, print))
    reads, passes = streams._reads, []

    def half_in_the_last_pass(file):
        passes.append(file)
        last = len(passes) == 3
        yield from itertools.islice(reads(file), 9 if last else None)
        if last and fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(shards, "SHARD_CHARACTERS", 4000)
    monkeypatch.setattr(streams, "CHUNK_BYTES", 2048)
    monkeypatch.setattr(streams, "_reads", half_in_the_last_pass)
    with pytest.raises(DataError, match=rf"^corpus\.jsonl\.gz: .*{problem}.*the same command goes on once"):
        prepare(data, VOCAB, print)
    (site,) = (tmp_path / "prepared").iterdir()
    kept = list((site / "shards").glob("*.npy"))
    lines = []
    folder = prepare(data, VOCAB, lines.append)
    assert contents(folder) == undisturbed
    assert json.loads((folder / "preparation.json").read_text())["shards_found"] == len(kept) >= 2
    assert not any("reading" in line or "training" in line for line in lines)


def test_a_second_starter_waits_and_finds_the_corpus_of_the_first(corpus):
    holds, waits = threading.Event(), threading.Event()
    found, lines = [], []

    def first(line):
        holds.set()
        assert waits.wait(60)

    def second(line):
        lines.append(line)
        waits.set()

    starter = threading.Thread(target=lambda: found.append(prepare(corpus, VOCAB, first)))
    starter.start()
    assert holds.wait(60)
    found.append(prepare(corpus, VOCAB, second))
    starter.join(60)
    assert found[0] == found[1]
    assert len(lines) == 1
    assert "another process prepares this corpus" in lines[0]


def test_input_that_changes_while_it_is_read_is_noticed(corpus, tmp_path):
    def change(line):
        if "training" in line:
            text = (tmp_path / "corpus.jsonl").read_text()
            (tmp_path / "corpus.jsonl").write_text(text.replace("self", "me", 1))

    with pytest.raises(DataError, match="changed while it was prepared"):
        prepare(corpus, VOCAB, change)


def test_ctrl_c_says_how_to_go_on(corpus):
    def interrupt(line):
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="the same command goes on"):
        prepare(corpus, VOCAB, interrupt)


def test_a_corpus_with_a_hugging_face_tokenizer_decodes_to_its_text(corpus, module_texts, tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(module_texts.values(), VOCAB, special_tokens=["</s>"], show_progress=False)
    trained.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    data = dataclasses.replace(corpus, tokenizer=str(tmp_path))
    folder = prepare(data, VOCAB, print)
    for split in SPLITS:
        store = TokenStore.open(folder, split)
        tokenizer = Tokenizer.load(store.tokenizer)
        texts = [tokenizer.decode(store.tokens[a:b]) for a, b in zip(store.offsets, store.offsets[1:], strict=False)]
        assert texts == [document.text for document in documents(data, split)]
    with pytest.raises(DataError, match=r"set model\.vocab=400"):
        prepare(data, 500, print)


def test_tokenizers_that_close_documents_differently_share_no_corpus(corpus, module_texts, tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(module_texts.values(), VOCAB, special_tokens=["</s>", "<end>"], show_progress=False)
    trained.save(str(tmp_path / "tokenizer.json"))
    ends = []
    for eos in ("</s>", "<end>"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        store = TokenStore.open(prepare(dataclasses.replace(corpus, tokenizer=str(tmp_path)), VOCAB, print), "train")
        ends.append(store.tokens[-1])
    assert ends == [0, 1]


def test_workers_do_not_import_the_model_or_torch():
    code = "import sys, nsa_train.data.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_site_that_its_holder_removes_meanwhile_is_made_again(tmp_path, monkeypatch):
    """Between a waiter's mkdir and its open, which then finds no folder; a file in the way is told all the same."""
    opened, site = Path.open, tmp_path / "site"

    def open_first_too_late(self, *arguments):
        monkeypatch.setattr(Path, "open", opened)
        self.parent.rmdir()
        return opened(self, *arguments)

    monkeypatch.setattr(Path, "open", open_first_too_late)
    with _lock(site, print) as lock:
        assert os.path.samestat(os.fstat(lock.fileno()), (site / "lock").stat())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        _lock(tmp_path / "file", print)
