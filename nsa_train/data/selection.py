"""Which documents a corpus keeps and which of them are held out: decided in one pass, before anything is tokenised."""

from __future__ import annotations

import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nsa_train.config.data_schema import DataConfig
from nsa_train.data.files import Document
from nsa_train.data.heldout import hash_of, held_out
from nsa_train.data.ledger import Ledger
from nsa_train.data.sources import Candidate, candidates
from nsa_train.errors import DataError

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
DROPPED = -1
SHINGLE_WORDS = 8
SKETCH_SIZE = 128
WORD = re.compile(r"\w+")


class ReadFailed(DataError):
    """Input that could be read when a corpus was chosen cannot be read now."""


@dataclass(frozen=True)
class Selection:
    """What a pass over all candidates decided. C candidates, in the order of `sources.candidates`.

    fate     [C]  int8, index into SPLITS, or DROPPED
    hashes   [C]  uint64, of the text
    bytes    [C]  int64, of the text
    sources  [C]  int32, index into `names`
    licences [C]  int32, index into `licence_names`
    left_out      reason -> number of documents or files that are in no split
    broken        first messages about input that could not be read
    """

    fate: np.ndarray
    hashes: np.ndarray
    bytes: np.ndarray
    sources: np.ndarray
    licences: np.ndarray
    names: list[str]
    licence_names: list[str]
    left_out: dict[str, int]
    broken: list[str]

    def save(self, path: Path) -> None:
        arrays: dict[str, Any] = {key: value for key, value in vars(self).items() if isinstance(value, np.ndarray)}
        words = {key: value for key, value in vars(self).items() if key not in arrays}
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, words=np.frombuffer(json.dumps(words).encode(), np.uint8), **arrays)
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def load(path: Path) -> Selection:
        with np.load(path) as arrays:
            words: dict[str, Any] = json.loads(arrays["words"].tobytes())
            return Selection(**words, **{key: arrays[key] for key in arrays.files if key != "words"})

    def of(self, split: Split) -> np.ndarray:
        """Which candidates lie in a split, bool [C]."""
        return self.fate == SPLITS.index(split)


def select(data: DataConfig, seen: Callable[[int], None] = lambda size: None) -> Selection:
    """Read every document once, and decide. `seen` is told the bytes of each document.

    A source with `heldout_paths` holds those documents out, any other one those of `heldout.held_out`. Of equal
    documents the first stays, a held-out one before any for training; so it is with documents that are at least
    `near_duplicates` alike, in the order of reading.
    Raises DataError for inputs that cannot be read, and where a split would be empty.
    """
    ledger = Ledger(data.on_error)
    alike = NearDuplicates(data.near_duplicates) if data.near_duplicates is not None else None
    columns = {"hashes": array("Q"), "bytes": array("q"), "sources": array("i"), "licences": array("i"),
               "origin": array("i"), "heldout": array("b"), "near": array("b")}  # fmt: skip
    names: dict[str, int] = {}
    licences: dict[str, int] = {}
    for candidate in candidates(data, ledger):
        document = candidate.document
        content = document.text.encode()
        identity = hash_of(content)
        row = {
            "hashes": identity,
            "bytes": len(content),
            "sources": names.setdefault(document.source, len(names)),
            "licences": licences.setdefault(document.licence or "unknown", len(licences)),
            "origin": candidate.origin,
            "heldout": candidate.heldout,
            "near": alike is not None and alike.seen_before(identity, document.text),
        }
        for key, value in row.items():
            columns[key].append(value)
        seen(len(content))
    c = {key: np.array(column) for key, column in columns.items()}
    heldout = _heldout(data, c)
    fate = np.where(heldout, SPLITS.index("heldout"), SPLITS.index("train")).astype(np.int8)
    repeated = _repeated(c["hashes"], heldout)
    similar = (c["near"] != 0) & ~repeated
    fate[repeated | similar] = DROPPED
    counts = ledger.left_out + Counter({"duplicate": int(repeated.sum()), "near duplicate": int(similar.sum())})
    for number, split in enumerate(SPLITS):
        if not (fate == number).any():
            raise DataError(f"corpus {data.name!r} has no document for its {split} split; look at {_places(data)}")
    return Selection(
        fate, c["hashes"], c["bytes"], c["sources"], c["licences"], list(names), list(licences),
        dict(sorted(counts.items())), ledger.broken,
    )  # fmt: skip


def chosen(data: DataConfig, selection: Selection) -> Iterator[tuple[Split, Document]]:
    """The documents that a corpus keeps, in order.

    Raises DataError where they are no longer those of the selection, ReadFailed where they cannot be read any more.
    """
    changed = f"the input of corpus {data.name!r} changed while it was prepared; run the command again"
    number = -1
    for number, candidate in enumerate(_read_again(data)):
        if number >= len(selection.fate):
            raise DataError(changed)
        if selection.fate[number] != DROPPED:
            if hash_of(candidate.document.text.encode()) != selection.hashes[number]:
                raise DataError(changed)
            yield SPLITS[selection.fate[number]], candidate.document
    if number + 1 != len(selection.fate):
        raise DataError(changed)


def _read_again(data: DataConfig) -> Iterator[Candidate]:
    try:
        yield from candidates(data, Ledger(data.on_error))
    except DataError as error:
        raise ReadFailed(str(error)) from error


def _heldout(data: DataConfig, c: dict[str, np.ndarray]) -> np.ndarray:
    """Which candidates are held out, bool [C]."""
    heldout = c["heldout"] != 0
    if not len(heldout):
        raise DataError(f"corpus {data.name!r} has no text; look at {_places(data)}")
    for origin, source in enumerate(data.named_sources.values()):
        if source.heldout_paths:
            continue
        mine = c["origin"] == origin
        heldout[mine] = held_out(c["hashes"][mine], source.heldout_share)
    if not heldout.any():
        raise DataError(
            f"every source of corpus {data.name!r} is a single document, which cannot be split; name others in "
            "data.heldout_paths"
        )
    return heldout


def _repeated(hashes: np.ndarray, heldout: np.ndarray) -> np.ndarray:
    """Which candidates equal an earlier one; held-out ones come first. bool [C]."""
    order = np.lexsort((np.arange(len(hashes)), ~heldout, hashes))
    same = np.concatenate([[False], hashes[order][1:] == hashes[order][:-1]])
    repeated = np.empty(len(hashes), bool)
    repeated[order] = same
    return repeated


def _places(data: DataConfig) -> str:
    return ", ".join(
        f"{'data' if source is data else name}.paths={list(source.paths)}"
        for name, source in data.named_sources.items()
    )


class NearDuplicates:
    """Finds documents that share most of their runs of eight words with an earlier one, by MinHash.

    Remembers about 1 kB of every document.
    """

    def __init__(self, threshold: float) -> None:
        import rensa

        self._rensa = rensa
        self._seen: dict[int, bool] = {}
        self._index = rensa.RMinHashDeduplicator(threshold, SKETCH_SIZE, True, seed=0)

    def seen_before(self, identity: int, text: str) -> bool:
        """Whether another document like this one was seen; it is remembered if not. `identity` is the text's hash.

        Of equal ones that of the first: which of them stays is no matter of likeness.
        """
        if identity in self._seen:
            return self._seen[identity]
        words = WORD.findall(text.lower())
        runs = {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}
        sketch = self._rensa.RMinHash(SKETCH_SIZE, 0)
        sketch.update(list(runs))
        self._seen[identity] = not self._index.add(str(identity), sketch)
        return self._seen[identity]
