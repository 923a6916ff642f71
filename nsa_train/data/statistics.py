"""What a manifest says about a split: how long its documents are, and how hard its tokens are to guess blindly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

PAST_TOKENS = (1024, 2048, 8192, 32768)
CHUNK_TOKENS = 1 << 24


def split_numbers(lengths: np.ndarray, sources: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Lengths and sources of a split in numbers.

    lengths  [documents]  int64, tokens
    sources  [documents]  int32, index into `names`

    `length_histogram` counts documents of n to 2n - 1 tokens under n; `share_past` is the share of tokens that have at
    least so many tokens of their own document before them.
    """
    total = int(lengths.sum())
    bits = np.bincount(np.frexp(lengths)[1] - 1)
    documents = np.bincount(sources, minlength=len(names))
    tokens = np.bincount(sources, weights=lengths, minlength=len(names))
    return {
        "documents": len(lengths),
        "tokens": total,
        "length_histogram": {str(2**power): int(count) for power, count in enumerate(bits) if count},
        "share_past": {str(n): round(float(np.maximum(lengths - n, 0).sum()) / total, 6) for n in PAST_TOKENS},
        "sources": {
            name: {"documents": int(documents[i]), "tokens": int(tokens[i])}
            for i, name in enumerate(names)
            if documents[i]
        },
    }


def target_counts(tokens: np.ndarray, offsets: np.ndarray, vocab: int) -> np.ndarray:
    """How often each token is a target, int64 [vocab]: every token but a document's first."""
    counts = np.zeros(vocab, np.int64)
    for at in range(0, len(tokens), CHUNK_TOKENS):
        counts += np.bincount(tokens[at : at + CHUNK_TOKENS], minlength=vocab)
    return counts - np.bincount(tokens[offsets[:-1]], minlength=vocab)


def unigram_entropy(train: np.ndarray, heldout: np.ndarray) -> float:
    """Nats per held-out target under the training targets' frequencies, add-one smoothed; both are counts [vocab]."""
    shares = (train + 1) / (train.sum() + len(train))
    return float(-(heldout * np.log(shares)).sum() / max(int(heldout.sum()), 1))
