"""What a manifest says about a split: how long its documents are, how full they make rows, how hard its tokens are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nsa_train.config.data_schema import DataConfig
from nsa_train.data.pack import Stretches, documents_in_row, make_plan

PAST_TOKENS = (1024, 2048, 8192, 32768)
LONG_TOKENS = (8192, 32768, 65536)
ALIGN = 64  # a selection block of NSA's: what `data.align` would be for the kernels


def split_numbers(lengths: np.ndarray, text_bytes: np.ndarray) -> dict[str, Any]:
    """Lengths of a split in numbers.

    lengths     [documents]  int64, tokens
    text_bytes  [documents]  int64, bytes of text

    `length_histogram` counts documents of n to 2n - 1 tokens under n; `share_past` is the share of tokens that have at
    least so many tokens of their own document before them; `share_in_long` that of documents of at least so many.
    """
    total, size = int(lengths.sum()), int(text_bytes.sum())
    bits = np.bincount(np.frexp(lengths)[1] - 1)
    return {
        "documents": len(lengths),
        "tokens": total,
        "bytes": size,
        "bytes_per_token": round(size / total, 4),
        "length_histogram": {str(2**power): int(count) for power, count in enumerate(bits) if count},
        "share_past": {str(n): round(float(np.maximum(lengths - n, 0).sum()) / total, 6) for n in PAST_TOKENS},
        "share_in_long": {str(n): round(float(lengths[lengths >= n].sum()) / total, 6) for n in LONG_TOKENS},
        "longest": int(lengths.max()),
    }


def source_numbers(
    lengths: np.ndarray, text_bytes: np.ndarray, sources: np.ndarray, names: Sequence[str], licences: np.ndarray,
    licence_names: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Documents, tokens, bytes and licences of each source in a split.

    sources   [documents]  int32, index into `names`
    licences  [documents]  int32, index into `licence_names`
    """
    count, kinds = len(names), len(licence_names)
    documents = np.bincount(sources, minlength=count)
    tokens = np.bincount(sources, weights=lengths, minlength=count)
    size = np.bincount(sources, weights=text_bytes, minlength=count)
    pairs, under = np.unique(sources.astype(np.int64) * kinds + licences, return_counts=True)
    found: dict[str, Any] = {
        name: {"documents": int(documents[i]), "tokens": int(tokens[i]), "bytes": int(size[i]), "licences": {}}
        for i, name in enumerate(names)
        if documents[i]
    }
    for pair, number in zip(pairs.tolist(), under.tolist(), strict=True):
        found[names[pair // kinds]]["licences"][licence_names[pair % kinds]] = number
    return found


def packing_numbers(lengths: np.ndarray, data: DataConfig) -> tuple[dict[str, Any], dict[str, float]]:
    """How full rows of 8k, 32k and 64k are without alignment and with it, and the processor's seconds of each plan."""
    rows: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for seq_len in LONG_TOKENS:
        rules = seq_len, documents_in_row(data.max_documents, seq_len), data.packing
        begin = time.process_time()
        plan = make_plan(Stretches.whole(lengths), *rules)
        seconds[str(seq_len)] = round(time.process_time() - begin, 4)
        padded = make_plan(Stretches.whole(lengths), *rules, ALIGN)
        rows[str(seq_len)] = {
            "rows": plan.rows,
            "utilisation": round(plan.utilisation, 6),
            f"utilisation_align_{ALIGN}": round(padded.utilisation, 6),
        }
    return {"packing": data.packing, "max_documents": data.max_documents, "rows": rows}, seconds


def unigram_entropy(train: np.ndarray, heldout: np.ndarray) -> float:
    """Nats per held-out target under the training targets' frequencies, add-one smoothed; both are counts [vocab]."""
    shares = (train + 1) / (train.sum() + len(train))
    return float(-(heldout * np.log(shares)).sum() / max(int(heldout.sum()), 1))


def plot_lengths(lengths: np.ndarray, title: str, path: Path) -> None:
    """Share of the tokens, and of the documents, in documents of n to 2n - 1 tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    power = np.frexp(lengths)[1] - 1
    places = np.arange(power.max() + 1)
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for shift, weights, label in ((-0.2, lengths, "tokens"), (0.2, None, "documents")):
        shares = np.bincount(power, weights=weights, minlength=len(places))
        axes.bar(places + shift, 100 * shares / shares.sum(), 0.4, label=label)
    axes.set_xticks(places, [_short(2**place) for place in places.tolist()])
    axes.set_xlabel("tokens of the document, at least")
    axes.set_ylabel("share, %")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _short(number: int) -> str:
    for size, unit in ((2**20, "M"), (2**10, "k")):
        if number >= size:
            return f"{number // size}{unit}"
    return str(number)
