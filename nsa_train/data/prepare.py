"""Tokenise a corpus once: text in, a folder for `TokenStore` out."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from nsa_train import runtime
from nsa_train.config.data_schema import DataConfig
from nsa_train.data import shards
from nsa_train.data.pack import PACKING_KEYS
from nsa_train.data.progress import Meter
from nsa_train.data.recall import KINDS, Haystack, recall_documents
from nsa_train.data.selection import DROPPED, SPLITS, ReadFailed, Selection, Split, chosen, select
from nsa_train.data.sources import input_stats
from nsa_train.data.statistics import packing_numbers, plot_lengths, source_numbers, split_numbers, unigram_entropy
from nsa_train.data.store import FIGURE, MANIFEST, SCHEMA, SPLIT_FILES, corpus_hash, read_manifest, sha256_of
from nsa_train.data.tokenizer import Tokenizer, train_tokenizer
from nsa_train.errors import DataError, Interrupted, StorageError

WAIT_S = 0.2
MOST_WORKERS = 16  # unless more are asked for: one process reads for all of them, 50 to 150 MB/s
SAMPLE_SEED = 0  # of the tokenizer's lines: runs of different seeds share one corpus
# Where, how fast, and what the loader does.
NOT_IN_KEY = ("corpus", "prepared_dir", "workers", "mixture", *PACKING_KEYS)


def prepare(data: DataConfig, vocab: int, progress: Callable[[str], None]) -> Path:
    """The folder of the tokenised corpus: `data.corpus`, or built on the first call and found again by later ones.

    The folder is named after everything that decides its content, so a changed input gets a new folder. A call that
    is killed, or cannot read its input any more, leaves its finished shards, and the next one goes on behind them.
    Other processes that prepare the same corpus wait. `progress` gets a line every few seconds.
    Raises DataError for unusable input, StorageError where the folder cannot be written, Interrupted by Ctrl-C.
    """
    if data.corpus:
        folder = Path(data.corpus)
        if (found := read_manifest(folder)["vocab"]) > vocab:
            raise DataError(f"data.corpus={folder}: its tokenizer has {found} pieces; set model.vocab={found}, or more")
        return folder
    base = Path(data.prepared_dir)
    folder = base / f"{data.name}-{_key(data, vocab)}"
    building = base / f".{folder.name}"
    try:
        if not folder.exists() or building.exists():
            with _lock(building, progress):
                try:
                    if not folder.exists():
                        _build(data, vocab, building, progress).rename(folder)
                except ReadFailed as error:
                    raise DataError(
                        f"{error}; what is finished is kept in {building}, and the same command goes on once the same "
                        "file can be read; with another in its place it begins anew"
                    ) from error
                except DataError:
                    shutil.rmtree(building, ignore_errors=True)
                    raise
                shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        place, reason = error.filename or building, error.strerror or error
        raise StorageError(f"{place}: cannot be written ({reason}); make room or set data.prepared_dir") from error
    except KeyboardInterrupt:
        raise Interrupted("stopped; what is tokenised is kept, and the same command goes on with the rest") from None
    read_manifest(folder)
    return folder


def _lock(building: Path, progress: Callable[[str], None]) -> IO[str]:
    """Wait for the lock of a building site; closing it, or dying, frees it. Its holder may remove the site."""
    told = False
    while True:
        building.parent.mkdir(parents=True, exist_ok=True)  # what hinders this is nobody's clearing up
        file = None
        try:
            building.mkdir(exist_ok=True)
            file = (building / "lock").open("w")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), (building / "lock").stat()):
                return file
        except BlockingIOError:
            if not told:
                progress(f"{building}: another process prepares this corpus; waiting for it")
            told = True
            time.sleep(WAIT_S)
        except (FileNotFoundError, FileExistsError):  # the holder finished and removed the site meanwhile
            if building.is_file():
                raise
        if file:
            file.close()


def _key(data: DataConfig, vocab: int) -> str:
    section = {key: value for key, value in dataclasses.asdict(data).items() if key not in NOT_IN_KEY}
    inputs: dict[str, Any] = {
        "schema": SCHEMA,
        "data": section,
        "vocab": vocab,
        "files": input_stats(data),
        "tokenizer": Tokenizer.load(data.tokenizer).sha256 if data.tokenizer else None,
        "python": _python(data),
    }
    if any(source.kind == "recall" for source in data.named_sources.values()):  # its text is made, not read
        made = recall_documents(
            "train", Haystack(["a haystack, of\n" * 9 + "some length " * 99]), 2 * len(KINDS), 1000, 2000
        )
        inputs["recall"] = [document.text for document in made]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]


def _python(data: DataConfig) -> str | None:
    """The version of Python, where the corpus is made of its library."""
    return platform.python_version() if any(s.kind == "stdlib" for s in data.named_sources.values()) else None


def _build(data: DataConfig, vocab: int, building: Path, progress: Callable[[str], None]) -> Path:
    """Everything in its order, each part found again when an earlier call finished it; the finished folder."""
    started = time.monotonic()
    selection = _selection(data, building / "selection.npz", progress)
    tokenizer = _tokenizer(data, vocab, selection, building / "tokenizer", progress)
    dtype = np.dtype("<u2" if vocab <= 65536 else "<u4")
    cost = _Cost()
    files = _tokenise(data, selection, building / "shards", tokenizer, dtype, cost, progress)
    target = building / "corpus"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    manifest = _assemble(data, vocab, selection, tokenizer, dtype, files, target, cost)
    facts = cost.facts(time.monotonic() - started)
    (target / "preparation.json").write_text(json.dumps(facts, indent=1) + "\n")
    (target / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")
    progress(
        f"{data.name}: {facts['wall_s']:.1f} s, {facts['tokens_per_core_s']:,} tokens/s a core, peak memory "
        f"{facts['peak_mib']:,} MiB and {facts['peak_worker_mib']:,} MiB in each of {facts['workers']} workers"
    )
    return target


def _selection(data: DataConfig, path: Path, progress: Callable[[str], None]) -> Selection:
    if not path.exists():
        with Meter(f"{data.name}: reading", progress) as meter:
            selection = select(data, meter.add)
        unfinished = path.with_suffix(".tmp")
        selection.save(unfinished)
        unfinished.rename(path)
    selection = Selection.load(path)
    if selection.left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in selection.left_out.items())
        progress(f"{data.name}: left out {reasons}")
    for line in selection.broken:
        progress(f"  {line}")
    return selection


def _tokenizer(
    data: DataConfig, vocab: int, selection: Selection, folder: Path, progress: Callable[[str], None]
) -> Path:
    """Where the given tokenizer, or one trained on the training split, lies in `folder`."""
    if not folder.exists():
        if data.tokenizer is None:
            progress(f"{data.name}: training a {data.tokenizer_kind} tokenizer of {vocab} pieces")
            texts = (document.text for split, document in chosen(data, selection) if split == "train")
            tokenizer = train_tokenizer(texts, vocab, data.tokenizer_kind, data.tokenizer_sample_mb, SAMPLE_SEED)
        else:
            tokenizer = Tokenizer.load(data.tokenizer)
        if tokenizer.vocab != vocab:
            raise DataError(
                f"data.tokenizer={data.tokenizer} has {tokenizer.vocab} pieces but model.vocab={vocab}; "
                f"set model.vocab={tokenizer.vocab}"
            )
        unfinished = folder.with_suffix(".tmp")
        unfinished.mkdir(exist_ok=True)
        tokenizer.save(unfinished)
        unfinished.rename(folder)
    return next(path for path in sorted(folder.iterdir(), reverse=True) if path.stem == "tokenizer")


class _Cost:
    """What tokenising and packing took; for people, so it stays out of the manifest."""

    def __init__(self) -> None:
        self.tokens, self.cpu_s, self.peak_worker, self.workers, self.found = 0, 0.0, 0, 1, 0
        self.packing_s: dict[str, float] = {}

    def add(self, work: shards.Work | None) -> None:
        if work is None:
            self.found += 1
        else:
            self.tokens += work.tokens
            self.cpu_s += work.cpu_s
            self.peak_worker = max(self.peak_worker, work.peak_bytes)

    def facts(self, wall_s: float) -> dict[str, Any]:
        return {
            "wall_s": round(wall_s, 2),
            "workers": self.workers,
            "shards_found": self.found,
            "tokens_per_core_s": round(self.tokens / self.cpu_s) if self.cpu_s else 0,
            "packing_s": self.packing_s,
            "peak_mib": runtime.peak_resident_bytes() >> 20,
            "peak_worker_mib": self.peak_worker >> 20,
        }


def _tokenise(
    data: DataConfig, selection: Selection, folder: Path, tokenizer: Path, dtype: np.dtype, cost: _Cost,
    progress: Callable[[str], None],
) -> dict[Split, list[Path]]:  # fmt: skip
    """Fill `folder` with the shards of the corpus; their files."""
    folder.mkdir(exist_ok=True)
    total = int(selection.bytes[selection.fate != DROPPED].sum())
    cost.workers = min(data.workers or min(runtime.cores(), MOST_WORKERS), 1 + total // shards.SHARD_CHARACTERS)
    texts = ((split, document.text) for split, document in chosen(data, selection))
    pieces = shards.shards_of(texts, Tokenizer.load(tokenizer).splits)
    with Meter(f"{data.name}: tokenising", progress, total) as meter:

        def done(shard: shards.Shard, work: shards.Work | None) -> None:
            cost.add(work)
            meter.add(sum(len(text.encode()) for text in shard.texts), work.tokens if work else 0)

        return shards.tokenise(pieces, folder, tokenizer, dtype, cost.workers, done)


def _assemble(
    data: DataConfig, vocab: int, selection: Selection, tokenizer: Path, dtype: np.dtype,
    files: dict[Split, list[Path]], target: Path, cost: _Cost,
) -> dict[str, Any]:  # fmt: skip
    """Everything of the corpus but its manifest, which it gives."""
    for file in tokenizer.parent.iterdir():
        shutil.copyfile(file, target / file.name)
    used = selection.sources[selection.fate != DROPPED]
    names = [selection.names[i] for i in dict.fromkeys(used.tolist())]
    place = {name: i for i, name in enumerate(names)}
    renumbered = np.array([place.get(name, -1) for name in selection.names], np.int32)
    numbers: dict[str, dict[str, Any]] = {}
    counts: dict[str, np.ndarray] = {}
    for split in SPLITS:
        (target / split).mkdir()
        offsets, counts[split] = _join(files[split], target / split / "tokens.bin", vocab)
        mine = selection.of(split)
        lengths, sources, text_bytes = np.diff(offsets), renumbered[selection.sources[mine]], selection.bytes[mine]
        np.save(target / split / "offsets.npy", offsets)
        np.save(target / split / "sources.npy", sources)
        numbers[split] = split_numbers(lengths, text_bytes) | {
            "sources": source_numbers(
                lengths, text_bytes, sources, names, selection.licences[mine], selection.licence_names
            ),
            **{key: sha256_of(target / split / name) for name, key in SPLIT_FILES.items()},
        }
        if split == "train":
            numbers[split]["packing"], cost.packing_s = packing_numbers(lengths, data)
            plot_lengths(lengths, f"{data.name}: {len(lengths):,} documents, {offsets[-1]:,} tokens", target / FIGURE)
    manifest = {
        "schema": SCHEMA,
        "name": data.name,
        "hash": "",
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": sha256_of(tokenizer),
        "vocab": vocab,
        "dtype": dtype.name,
        "python": _python(data),
        "unigram_entropy": unigram_entropy(counts["train"], counts["heldout"]),
        "left_out": selection.left_out,
        "broken": selection.broken,
        "sources": names,
        **numbers,
    }
    return manifest | {"hash": corpus_hash(manifest)}


def _join(files: list[Path], target: Path, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Shards as one file of tokens; offsets int64 [documents + 1], and how often each token is a target, [vocab].

    Every token is a target but a document's first.
    """
    pieces, ends = [], []
    targets = np.zeros(vocab, np.int64)
    begins = True  # a document, with the next piece
    with target.open("wb") as file:
        for shard in files:
            tokens, lengths, last = shards.read_shard(shard)
            file.write(tokens.data)
            pieces.append(lengths)
            ends.append(last)
            starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
            first = tokens[starts[np.concatenate([[begins], last[:-1]])]]
            targets += np.bincount(tokens, minlength=vocab) - np.bincount(first, minlength=vocab)
            begins = bool(last[-1])
        file.flush()
        os.fsync(file.fileno())
    bounds = np.cumsum(np.concatenate(pieces))[np.concatenate(ends)]
    return np.concatenate([[0], bounds]).astype(np.int64), targets
