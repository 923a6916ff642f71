"""Tokenise a corpus once: text in, a folder for `TokenStore` out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import time
import uuid
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nsa_train.config.schema import DataConfig
from nsa_train.data.files import input_files
from nsa_train.data.sources import SPLITS, Split, documents
from nsa_train.data.statistics import split_numbers, target_counts, unigram_entropy
from nsa_train.data.store import MANIFEST, SCHEMA, SPLIT_FILES, TOKENIZER, read_manifest, sha256_of
from nsa_train.data.tokenizer import Tokenizer, train_tokenizer
from nsa_train.errors import DataError, StorageError

PROGRESS_S = 5.0
SAMPLE_SEED = 0  # of the tokenizer's lines: runs of different seeds share one corpus
LICENCES = {"stdlib": "PSF-2.0"}
PACKING = ("packing", "max_documents", "align", "long_copies", "mixture")
NOT_IN_KEY = ("prepared_dir", *PACKING)  # where the result lies, and what the loader does with it


def prepare(data: DataConfig, vocab: int, progress: Callable[[str], None]) -> Path:
    """The folder of the tokenised corpus; built on the first call, found again by every later one.

    The folder is named after everything that decides its content, so a changed input gets a new folder.
    `progress` gets a line every few seconds. Safe against a kill and
    against other processes that prepare the same corpus.
    Raises DataError for unusable input, StorageError where the folder cannot be written.
    """
    base = Path(data.prepared_dir)
    folder = base / f"{data.name}-{_key(data, vocab)}"
    building = base / f".{folder.name}-{uuid.uuid4().hex[:8]}"
    try:
        if not folder.exists():
            building.mkdir(parents=True)
            _build(data, vocab, building, progress)
            _publish(building, folder)
    except OSError as error:
        place, reason = error.filename or building, error.strerror or error
        raise StorageError(f"{place}: cannot be written ({reason}); make room or set data.prepared_dir") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    read_manifest(folder)
    return folder


def _publish(building: Path, folder: Path) -> None:
    try:
        building.rename(folder)
    except OSError:
        if not folder.exists():  # otherwise another process was faster, with the same content
            raise


def _key(data: DataConfig, vocab: int) -> str:
    section = {key: value for key, value in dataclasses.asdict(data).items() if key not in NOT_IN_KEY}
    paths = [*data.heldout_paths, *(data.paths if data.source == "files" else ())]
    stats = [(str(path.relative_to(data.root)), path.stat()) for path in input_files(data.root, paths)]
    inputs: dict[str, Any] = {
        "schema": SCHEMA,
        "data": section,
        "vocab": vocab,
        "files": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        "tokenizer": Tokenizer.load(data.tokenizer).sha256 if data.tokenizer else None,
        "python": platform.python_version() if data.source == "stdlib" else None,
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]


def _build(data: DataConfig, vocab: int, folder: Path, progress: Callable[[str], None]) -> None:
    tokenizer = _tokenizer(data, vocab, folder / TOKENIZER, progress)
    dtype = np.dtype("<u2" if vocab <= 65536 else "<u4")
    names: dict[str, int] = {}
    written = {split: _write_split(data, split, folder / split, tokenizer, dtype, names, progress) for split in SPLITS}
    numbers: dict[str, dict[str, Any]] = {}
    counts: dict[str, np.ndarray] = {}
    for split, (offsets, sources, text_bytes) in written.items():
        digests = {key: sha256_of(folder / split / name) for name, key in SPLIT_FILES.items()}
        numbers[split] = split_numbers(np.diff(offsets), sources, list(names)) | {"bytes": text_bytes} | digests
        tokens = np.memmap(folder / split / "tokens.bin", dtype, mode="r")
        counts[split] = target_counts(tokens, offsets, vocab)
    identity = [tokenizer.sha256, dtype.name, *(numbers[s][k] for s in SPLITS for k in ("sha256", "offsets_sha256"))]
    manifest = {
        "schema": SCHEMA,
        "name": data.name,
        "hash": hashlib.sha256("|".join(identity).encode()).hexdigest(),
        "tokenizer_sha256": tokenizer.sha256,
        "vocab": vocab,
        "dtype": dtype.name,
        "python": platform.python_version() if data.source == "stdlib" else None,
        "licence": LICENCES.get(data.source),
        "unigram_entropy": unigram_entropy(counts["train"], counts["heldout"]),
        "sources": list(names),
        **numbers,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _tokenizer(data: DataConfig, vocab: int, path: Path, progress: Callable[[str], None]) -> Tokenizer:
    """The given tokenizer, copied to `path`, or one trained on the training split."""
    if data.tokenizer is None:
        progress(f"{data.name}: training a {data.tokenizer_kind} tokenizer of {vocab} pieces")
        texts = (document.text for document in documents(data, "train"))
        return train_tokenizer(texts, vocab, data.tokenizer_kind, data.tokenizer_sample_mb, SAMPLE_SEED, path)
    tokenizer = Tokenizer.load(data.tokenizer)
    if tokenizer.vocab != vocab:
        raise DataError(
            f"data.tokenizer={data.tokenizer} has {tokenizer.vocab} pieces but model.vocab={vocab}; "
            f"set model.vocab={tokenizer.vocab}"
        )
    shutil.copyfile(data.tokenizer, path)
    return tokenizer


def _write_split(
    data: DataConfig, split: Split, folder: Path, tokenizer: Tokenizer, dtype: np.dtype, names: dict[str, int],
    progress: Callable[[str], None],
) -> tuple[np.ndarray, np.ndarray, int]:  # fmt: skip
    """Tokenise one split into `folder`; new source names get the next number in `names`.

    Gives offsets int64 [documents + 1], sources int32 [documents], and the bytes of text.
    """
    folder.mkdir()
    ends, sources, text_bytes = array("q", [0]), array("i"), 0
    started = reported = time.monotonic()

    def report() -> None:
        speed = ends[-1] / max(time.monotonic() - started, 1e-3)
        progress(f"{data.name}/{split}: {text_bytes / 1e6:.1f} MB, {ends[-1]:,} tokens, {speed:,.0f} tokens/s")

    with (folder / "tokens.bin").open("wb") as file:
        for document in documents(data, split):
            ids = tokenizer.encode(document.text)
            file.write(np.append(ids, tokenizer.eos).astype(dtype).tobytes())
            ends.append(ends[-1] + len(ids) + 1)
            sources.append(names.setdefault(document.source, len(names)))
            text_bytes += len(document.text.encode())
            if time.monotonic() - reported > PROGRESS_S:
                reported = time.monotonic()
                report()
        file.flush()
        os.fsync(file.fileno())
    if not sources:
        raise DataError(f"corpus {data.name!r} has no document for its {split} split; look at data.paths")
    report()
    offsets, indices = np.array(ends, np.int64), np.array(sources, np.int32)
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "sources.npy", indices)
    return offsets, indices, text_bytes
