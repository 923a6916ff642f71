"""Which documents of a source are held out where no files are named for it: told by a hash of their text."""

from __future__ import annotations

import hashlib

import numpy as np


def hash_of(content: bytes) -> int:
    """64 bits of the text's sha256: both the document's place in the split and its identity."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def held_out(hashes: np.ndarray, share: float) -> np.ndarray:
    """Of the documents of a source, uint64 [n] -> bool [n]: where the hash, as a fraction, is below `share`.

    At least one document lands in either split, unless there is only one, which trains.
    """
    if not len(hashes) or hashes.min() == hashes.max():
        return np.zeros(len(hashes), bool)
    return hashes < np.uint64(min(max(int(share * 2**64), int(hashes.min()) + 1), int(hashes.max())))
