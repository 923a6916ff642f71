"""A prepared corpus on disk: layout of its folder, and `TokenStore`, which checks and opens one split of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nsa_train.data.selection import SPLITS, Split
from nsa_train.errors import DataError

SCHEMA = "nsa-train/corpus/2"
MANIFEST = "manifest.json"
FIGURE = "lengths.png"
SPLIT_FILES = {"tokens.bin": "sha256", "offsets.npy": "offsets_sha256", "sources.npy": "sources_sha256"}
REMEDY = "delete the folder to prepare again if `nsa-train prepare` made it, else name one that it made"
CHUNK_TOKENS = 1 << 24  # looked at together


@dataclass(frozen=True)
class TokenStore:
    """One split of a prepared corpus.

    tokens    [tokens]         uint16 or uint32, memory map; every document ends with its end-of-document token
    offsets   [documents + 1]  int64, document i is tokens[offsets[i] : offsets[i + 1]]
    sources   [documents]      int32, index into manifest["sources"]
    """

    folder: Path
    split: Split
    manifest: dict[str, Any]
    tokens: np.ndarray
    offsets: np.ndarray
    sources: np.ndarray

    @staticmethod
    def open(folder: Path | str, split: Split) -> TokenStore:
        """Check every file of the split against the manifest (sizes, digests, order, token range) and map it.

        Raises DataError naming the file and what is wrong with it.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        numbers, inside = manifest[split], folder / split
        _check_digest(folder / manifest["tokenizer"], manifest["tokenizer_sha256"])
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        path = inside / "tokens.bin"
        size, wanted = path.stat().st_size if path.is_file() else 0, numbers["tokens"] * dtype.itemsize
        if size != wanted:
            raise DataError(f"{path}: {size} bytes, the manifest says {wanted}; {REMEDY}")
        for name, key in SPLIT_FILES.items():
            _check_digest(inside / name, numbers[key])
        tokens = np.memmap(path, dtype, mode="r")
        offsets = _load(inside / "offsets.npy", np.int64, numbers["documents"] + 1)
        if offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) < 1).any():
            raise DataError(f"{inside / 'offsets.npy'}: not rising from 0 to {len(tokens)} tokens; {REMEDY}")
        sources = _load(inside / "sources.npy", np.int32, numbers["documents"])
        if sources.min() < 0 or sources.max() >= len(manifest["sources"]):
            raise DataError(f"{inside / 'sources.npy'}: names other than {len(manifest['sources'])} sources; {REMEDY}")
        highest = max(int(tokens[at : at + CHUNK_TOKENS].max()) for at in range(0, len(tokens), CHUNK_TOKENS))
        if highest >= manifest["vocab"]:
            raise DataError(f"{path}: token {highest} lies outside the vocabulary of {manifest['vocab']}; {REMEDY}")
        return TokenStore(folder, split, manifest, tokens, offsets, sources)

    @property
    def hash(self) -> str:
        """Of the whole corpus, both splits and the tokenizer."""
        return self.manifest["hash"]

    @property
    def tokenizer(self) -> Path:
        """What `Tokenizer.load` takes."""
        return self.folder / self.manifest["tokenizer"]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]."""
        return np.diff(self.offsets)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared corpus. Raises DataError where it is missing, damaged or of another version."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no manifest of a prepared corpus ({error}); {REMEDY}") from error
    found = manifest.get("schema") if isinstance(manifest, dict) else None
    if found != SCHEMA:
        raise DataError(f"{path}: schema is {found!r}, not {SCHEMA!r}; {REMEDY}")
    try:
        whole = isinstance(manifest["vocab"], int) and manifest["hash"] == corpus_hash(manifest)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error!r}); {REMEDY}") from error
    if not whole:
        raise DataError(f"{path}: damaged, its hash is not that of the digests in it; {REMEDY}")
    return manifest


def corpus_hash(manifest: dict[str, Any]) -> str:
    """One hash for the tokenizer and the tokens and documents of both splits, from their digests in the manifest."""
    digests = (manifest[split][key] for split in SPLITS for key in ("sha256", "offsets_sha256"))
    identity = [manifest["tokenizer_sha256"], manifest["dtype"], *digests]
    return hashlib.sha256("|".join(identity).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_digest(path: Path, wanted: str) -> None:
    try:
        found = sha256_of(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the disk and its permissions") from error
    if found != wanted:
        raise DataError(f"{path}: damaged, its sha256 is not the manifest's; {REMEDY}")


def _load(path: Path, dtype: type, count: int) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{path}: not a NumPy array ({error}); {REMEDY}") from error
    if array.dtype != dtype or array.shape != (count,):
        raise DataError(f"{path}: {array.dtype} {list(array.shape)}, not {dtype.__name__} [{count}]; {REMEDY}")
    return array
