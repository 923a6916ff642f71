"""Where documents come from, and which of them are held out."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from nsa_train.config.schema import DataConfig
from nsa_train.data.files import Document, file_documents
from nsa_train.errors import DataError

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

# Codec tables, the bundled pip, and the programs and grammar tools that nobody imports.
NOT_CORPUS = {"encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
TEST_FOLDERS = {"test", "tests"}


def documents(data: DataConfig, split: Split) -> Iterator[Document]:
    """Documents of one split in a fixed order, exact duplicates dropped (the first stays).

    With `heldout_paths` those files are the held-out split, and the training split leaves out whatever equals one of
    them. Otherwise a document is held out where the hash of its text, as a fraction, is below `heldout_share`; at
    least one document lands in either split. Reads the inputs once more than it yields them, to know that.
    Raises DataError for inputs that cannot be read, and where there is only one document to split.
    """
    seen: set[int] = set()
    if data.heldout_paths:
        if split == "heldout":
            candidates = _heldout_files(data)
        else:
            seen = {_hash(document) for document in _heldout_files(data)}
            candidates = SOURCES[data.source](data)
    else:
        limit = _heldout_limit(data)
        candidates = (
            document for document in SOURCES[data.source](data) if (_hash(document) < limit) == (split == "heldout")
        )
    for document in candidates:
        key = _hash(document)
        if key not in seen:
            seen.add(key)
            yield document


def _hash(document: Document) -> int:
    """64 bits of the text's sha256: both the document's place in the split and its identity."""
    return int.from_bytes(hashlib.sha256(document.text.encode()).digest()[:8], "big")


def _heldout_limit(data: DataConfig) -> int:
    """Documents whose hash is below this are held out."""
    lowest, highest = 2**64, -1
    for document in SOURCES[data.source](data):
        key = _hash(document)
        lowest, highest = min(lowest, key), max(highest, key)
    if highest < 0:
        raise DataError(f"corpus {data.name!r} has no text; look at data.paths={list(data.paths)}")
    if lowest == highest:
        raise DataError(
            f"corpus {data.name!r} is a single document, which cannot be split; name others in data.heldout_paths"
        )
    return min(max(int(data.heldout_share * 2**64), lowest + 1), highest)


def _heldout_files(data: DataConfig) -> Iterator[Document]:
    return file_documents(data.root, data.heldout_paths, data.text_field)


def _files(data: DataConfig) -> Iterator[Document]:
    return file_documents(data.root, data.paths, data.text_field)


def _stdlib(data: DataConfig) -> Iterator[Document]:
    """One document per top-level module or package, and one of the language reference's topics."""
    root = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names - NOT_CORPUS):
        package = root / name
        if package.is_dir():
            files = sorted(file for file in package.rglob("*.py") if not _is_test(file.relative_to(root)))
        else:
            files = [file] if (file := root / f"{name}.py").is_file() else []
        text = "\n".join(f"# {file.relative_to(root).as_posix()}\n{file.read_text('utf-8')}" for file in files)
        if text:
            yield Document(text, "stdlib", name)
    from pydoc_data.topics import topics

    yield Document("\n".join(topics[key] for key in sorted(topics)), "stdlib", "pydoc_data.topics")


def _is_test(path: Path) -> bool:
    return path.name.startswith("test_") or not TEST_FOLDERS.isdisjoint(path.parts[:-1])


SOURCES = {"stdlib": _stdlib, "files": _files}
