"""Small corpora of real text for the tests of the data pipeline."""

import dataclasses
import json
import sysconfig
from pathlib import Path

import pytest

from nsa_train.config.load import load_config
from nsa_train.data.prepare import prepare
from nsa_train.data.store import TokenStore

VOCAB = 400
MODULES = ("abc", "bisect", "cmd", "copy", "csv", "fnmatch", "glob", "heapq", "keyword", "queue", "sched", "shlex")


@pytest.fixture(scope="session")
def module_texts():
    """Twelve short modules of the standard library, 0.1 MB."""
    return {name: (Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text("utf-8") for name in MODULES}


@pytest.fixture
def data_config(tmp_path):
    """A DataConfig with `data.root` and `data.prepared_dir` under tmp_path; keywords are its fields."""

    def make(**fields):
        base = load_config(["experiment=tiny", "data=files", "data.paths=[corpus.jsonl]"]).data
        places = {"root": str(tmp_path), "prepared_dir": str(tmp_path / "prepared")}
        return dataclasses.replace(base, **(places | fields))

    return make


@pytest.fixture(scope="session")
def prepared(module_texts, tmp_path_factory):
    """(DataConfig, folder) of the twelve modules, tokenised once for all tests that only read."""
    root = tmp_path_factory.mktemp("corpus")
    records = [{"text": text, "source": "long" if len(text) > 8000 else "short"} for text in module_texts.values()]
    (root / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    base = load_config(["experiment=tiny", "data=files", "data.paths=[corpus.jsonl]"]).data
    data = dataclasses.replace(base, root=str(root), prepared_dir=str(root / "prepared"), heldout_share=0.3)
    return data, prepare(data, VOCAB, lambda line: None)


@pytest.fixture
def store(prepared):
    return TokenStore.open(prepared[1], "train")
