"""Claims about prepared corpora: built once, described truthfully, refused when damaged."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from helpers import documents

from nsa_train.config.load import load_config
from nsa_train.data.pack import Stretches, make_plan
from nsa_train.data.prepare import prepare
from nsa_train.data.selection import SPLITS
from nsa_train.data.store import TokenStore, corpus_hash, sha256_of
from nsa_train.data.tokenizer import Tokenizer
from nsa_train.errors import DataError, StorageError

VOCAB = 400


def quiet(line):
    pass


def write_corpus(data, texts):
    with open(f"{data.root}/corpus.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.fixture
def small(data_config, module_texts):
    """A DataConfig of the twelve modules that was not prepared yet."""
    data = data_config(heldout_share=0.3)
    write_corpus(data, module_texts.values())
    return data


@pytest.fixture
def damaged(prepared, tmp_path):
    """A copy of the prepared corpus for tests that spoil it."""
    return shutil.copytree(prepared[1], tmp_path / "damaged")


def test_the_store_holds_every_document_and_its_end(prepared):
    data, folder = prepared
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    for split in SPLITS:
        store = TokenStore.open(folder, split)
        names = store.manifest["sources"]
        for i, document in enumerate(documents(data, split)):
            ids = store.tokens[store.offsets[i] : store.offsets[i + 1]]
            assert ids[-1] == tokenizer.eos
            assert tokenizer.decode(ids[:-1]) == document.text
            assert names[store.sources[i]] == document.source
        assert len(store.lengths) == i + 1


def test_preparing_twice_gives_the_folder_without_building_again(small):
    lines = []
    first = prepare(small, VOCAB, lines.append)
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert lines
    lines.clear()
    assert prepare(small, VOCAB, lines.append) == first
    assert not lines
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_the_same_input_elsewhere_gives_the_same_hash(small, tmp_path):
    first = prepare(small, VOCAB, quiet)
    second = prepare(dataclasses.replace(small, prepared_dir=str(tmp_path / "other")), VOCAB, quiet)
    assert TokenStore.open(first, "train").hash == TokenStore.open(second, "train").hash
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()


def test_a_changed_input_or_setting_gets_another_folder_and_how_rows_are_packed_does_not(small):
    first = prepare(small, VOCAB, quiet)
    assert prepare(dataclasses.replace(small, max_documents=3), VOCAB, quiet) == first
    others = [prepare(dataclasses.replace(small, heldout_share=0.5), VOCAB, quiet), prepare(small, 390, quiet)]
    write_corpus(small, ["another text, much longer than nothing\n" * 20 + chr(c) * 30 for c in range(64, 99)] * 2)
    others.append(prepare(small, 300, quiet))
    assert len({first, *others}) == 4


def test_a_failed_build_leaves_nothing_behind(small, tmp_path):
    write_corpus(small, ["a few words", "and some more"])
    with pytest.raises(DataError, match=r"set model\.vocab"):
        prepare(small, VOCAB, quiet)
    assert list((tmp_path / "prepared").iterdir()) == []


def test_the_manifest_counts_what_is_in_the_store(prepared):
    data, folder = prepared
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["vocab"], manifest["dtype"], manifest["python"]) == (VOCAB, "uint16", None)
    assert (manifest["left_out"], manifest["broken"]) == ({}, [])
    for split in SPLITS:
        lengths, numbers = TokenStore.open(folder, split).lengths.tolist(), manifest[split]
        assert (numbers["documents"], numbers["tokens"]) == (len(lengths), sum(lengths))
        assert numbers["bytes"] == sum(len(document.text.encode()) for document in documents(data, split))
        assert numbers["bytes_per_token"] == pytest.approx(numbers["bytes"] / sum(lengths), abs=1e-4)
        long = sum(n for n in lengths if n >= 8192) / sum(lengths)
        assert numbers["share_in_long"]["8192"] == pytest.approx(long, abs=1e-6)
        past = sum(max(n - 2048, 0) for n in lengths) / sum(lengths)
        assert numbers["share_past"]["2048"] == pytest.approx(past, abs=1e-6)
        assert numbers["length_histogram"] == {
            str(2**k): sum(2**k <= n < 2 ** (k + 1) for n in lengths)
            for k in range(20)
            if any(2**k <= n < 2 ** (k + 1) for n in lengths)
        }
        for key in ("documents", "tokens", "bytes"):
            assert sum(source[key] for source in numbers["sources"].values()) == numbers[key]
    assert set(manifest["train"]["sources"]) == {"long", "short"}


def test_the_manifest_says_how_full_rows_of_64k_are_with_and_without_alignment(prepared):
    """The corpus fills less than one of them: 10 documents, each padded to a multiple of 64."""
    _, folder = prepared
    lengths = TokenStore.open(folder, "train").lengths
    packing = json.loads((folder / "manifest.json").read_text())["train"]["packing"]
    assert (packing["packing"], packing["max_documents"], list(packing["rows"])) == (
        "best_fit", 64, ["8192", "32768", "65536"],
    )  # fmt: skip
    assert packing["rows"]["65536"]["rows"] == 1
    assert packing["rows"]["65536"]["utilisation"] == pytest.approx(lengths.sum() / 65536, abs=1e-6)
    aligned = make_plan(Stretches.whole(lengths), 8192, 64, "best_fit", 64)
    assert packing["rows"]["8192"]["utilisation_align_64"] == pytest.approx(aligned.utilisation, abs=1e-6)
    assert set(json.loads((folder / "preparation.json").read_text())["packing_s"]) == set(packing["rows"])


def test_unigram_entropy_is_what_a_direct_computation_gives(prepared):
    _, folder = prepared
    counts = np.ones(VOCAB)
    losses = []
    for split in SPLITS:
        store = TokenStore.open(folder, split)
        for begin, end in zip(store.offsets[:-1], store.offsets[1:], strict=True):
            for token in store.tokens[begin + 1 : end]:
                if split == "train":
                    counts[token] += 1
                else:
                    losses.append(-np.log(counts[token] / counts.sum()))
    assert store.manifest["unigram_entropy"] == pytest.approx(np.mean(losses), rel=1e-9)
    assert 2 < np.mean(losses) < np.log(VOCAB)


def test_a_given_tokenizer_is_copied_and_must_have_the_models_vocabulary(prepared, small):
    given = prepared[1] / "tokenizer.model"
    data = dataclasses.replace(small, tokenizer=str(given))
    folder = prepare(data, VOCAB, quiet)
    assert (folder / "tokenizer.model").read_bytes() == given.read_bytes()
    with pytest.raises(DataError, match=r"has 400 pieces but model\.vocab=512; set model\.vocab=400"):
        prepare(data, 512, quiet)


def test_empty_files_are_no_corpus(data_config):
    data = data_config(heldout_paths=("corpus.jsonl",))
    write_corpus(data, ["", ""])
    with pytest.raises(DataError, match="no text"):
        prepare(data, VOCAB, quiet)


def test_a_folder_that_cannot_be_written_is_a_storage_error(small, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageError, match=r"taken.*set data\.prepared_dir"):
        prepare(dataclasses.replace(small, prepared_dir=str(tmp_path / "taken" / "below")), VOCAB, quiet)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere" / "scratch")
    with pytest.raises(StorageError, match=r"gone.*set data\.prepared_dir"):
        prepare(dataclasses.replace(small, prepared_dir=str(tmp_path / "gone")), VOCAB, quiet)


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["train/tokens.bin", "train/offsets.npy", "train/sources.npy", "tokenizer.model"])
def test_a_flipped_byte_is_refused_by_name(name, damaged):
    TokenStore.open(damaged, "train")
    flip_last_byte(damaged / name)
    with pytest.raises(DataError, match=rf"{name}: damaged.*delete the folder to prepare again"):
        TokenStore.open(damaged, "train")


def test_a_short_token_file_is_refused_with_both_sizes(damaged):
    size = (damaged / "train/tokens.bin").stat().st_size
    os.truncate(damaged / "train/tokens.bin", size - 2)
    with pytest.raises(DataError, match=rf"tokens\.bin: {size - 2} bytes, the manifest says {size}"):
        TokenStore.open(damaged, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no manifest"), ("{", "no manifest"), ('{"schema": "other/2"}', "schema is 'other/2'")],
)
def test_a_folder_without_its_manifest_is_refused(content, message, damaged):
    (damaged / "manifest.json").unlink()
    if content is not None:
        (damaged / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=rf"manifest\.json: {message}"):
        TokenStore.open(damaged, "heldout")


def test_a_manifest_whose_hash_is_not_that_of_its_digests_is_refused(damaged):
    manifest = json.loads((damaged / "manifest.json").read_text())
    (damaged / "manifest.json").write_text(json.dumps(manifest | {"hash": "0" * 64}))
    with pytest.raises(DataError, match=r"manifest\.json: damaged, its hash is not that of the digests"):
        TokenStore.open(damaged, "train")


def test_what_a_kill_left_beside_a_finished_corpus_is_removed(small):
    folder = prepare(small, VOCAB, quiet)
    site = folder.with_name(f".{folder.name}")
    (site / "shards").mkdir(parents=True)
    assert prepare(small, VOCAB, quiet) == folder
    assert not site.exists()


def resign(folder, name, key):
    """Make the manifest agree with a file that a test changed."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["train"][key] = sha256_of(folder / "train" / name)
    manifest["hash"] = corpus_hash(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_offsets_out_of_order_are_refused(damaged):
    offsets = np.load(damaged / "train/offsets.npy")
    offsets[[1, 2]] = offsets[[2, 1]]
    np.save(damaged / "train/offsets.npy", offsets)
    resign(damaged, "offsets.npy", "offsets_sha256")
    with pytest.raises(DataError, match=r"offsets\.npy: not rising"):
        TokenStore.open(damaged, "train")


def test_a_token_outside_the_vocabulary_is_refused(damaged):
    tokens = np.fromfile(damaged / "train/tokens.bin", np.uint16)
    tokens[17] = VOCAB
    tokens.tofile(damaged / "train/tokens.bin")
    resign(damaged, "tokens.bin", "sha256")
    with pytest.raises(DataError, match=r"tokens\.bin: token 400 lies outside the vocabulary of 400"):
        TokenStore.open(damaged, "train")


def test_the_standard_library_becomes_a_corpus_of_long_documents(tmp_path):
    data = dataclasses.replace(load_config(["experiment=tiny"]).data, prepared_dir=str(tmp_path))
    folder = prepare(data, 2048, quiet)
    manifest = TokenStore.open(folder, "train").manifest
    assert manifest["train"]["sources"]["stdlib"]["licences"] == {"PSF-2.0": manifest["train"]["documents"]}
    assert manifest["python"]
    assert manifest["train"]["tokens"] > 2_000_000
    assert manifest["train"]["share_past"]["8192"] > 0.5
    assert manifest["heldout"]["tokens"] > 20_000
    assert 5 < manifest["unigram_entropy"] < 7


def test_a_corpus_prepared_elsewhere_needs_no_sources(prepared, tmp_path):
    data, folder = prepared
    moved = shutil.copytree(folder, tmp_path / "moved")
    there = dataclasses.replace(data, corpus=str(moved), root=str(tmp_path / "nowhere"), prepared_dir="nowhere")
    vocab = json.loads((moved / "manifest.json").read_text())["vocab"]
    assert prepare(there, vocab, quiet) == prepare(there, vocab + 1, quiet) == moved
    with pytest.raises(DataError, match=f"has {vocab} pieces; set model.vocab={vocab}"):
        prepare(there, vocab - 1, quiet)
