"""How fast the data pipeline is on one core: planning, reading packed rows, tokenising.

Writes data.json and a figure beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nsa_train import runtime
from nsa_train.bench.figures import plot_bars
from nsa_train.bench.results import RESULTS, write_result
from nsa_train.config.load import load_config
from nsa_train.config.schema import Config
from nsa_train.data.loader import Loader
from nsa_train.data.pack import Stretches, documents_in_row, make_plan
from nsa_train.data.prepare import prepare
from nsa_train.data.stages import Stage
from nsa_train.data.statistics import ALIGN, LONG_TOKENS
from nsa_train.data.store import TokenStore
from nsa_train.data.tokenizer import Tokenizer

Row = dict[str, Any]
TOKENIZED_TOKENS = 2_000_000  # at most
TAIL, TAIL_FROM, TAIL_TO, TAIL_POWER = 0.022, 8192, 1_130_000, 0.925  # of realistic_lengths


def main(arguments: list[str]) -> int:
    """`nsa-train bench data [key=value ...]`"""
    parser = argparse.ArgumentParser(prog="nsa-train bench data", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="the corpus whose text is tokenised")
    parser.add_argument("--documents", type=int, default=10_000_000, help="to plan")
    parser.add_argument("--tokens", type=int, default=200_000_000, help="to read packed rows from")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of JSON and figure")
    options = parser.parse_args(arguments)
    config = load_config(options.overrides)
    rows = [*planning(config, options.documents), *reading(config, options.tokens), *tokenising(config)]
    written = write_result("data", "data", rows, folder=options.out)
    plot_bars(rows, written.with_suffix(".png"), "the data pipeline on one core", "unit", "what", "value")
    runtime.log.info("%s", written)
    return 0


def realistic_lengths(documents: int, seed: int = 0) -> np.ndarray:
    """Documents as long as those of a web-like mixture, int64 [documents].

    A log-normal body and a power-law tail: median 570, mean 1,850; 54, 39 and 32% of the tokens lie in documents of at
    least 8k, 32k and 64k tokens.
    """
    generator = np.random.default_rng(seed)
    lengths = np.exp(generator.normal(np.log(550), 1.0, documents))
    tail = generator.random(documents) < TAIL
    quantile = generator.random(int(tail.sum())) * (1 - (TAIL_FROM / TAIL_TO) ** TAIL_POWER)
    lengths[tail] = TAIL_FROM * (1 - quantile) ** (-1 / TAIL_POWER)
    return np.maximum(2, lengths).astype(np.int64)


def planning(config: Config, documents: int) -> list[Row]:
    """Seconds of one plan and how full its rows are, before and with alignment."""
    stretches = Stretches.whole(realistic_lengths(documents))
    rows = []
    for seq_len in LONG_TOKENS:
        limit = documents_in_row(config.data.max_documents, seq_len)
        for kind in ("best_fit", "concat", "long"):
            what = f"plan {documents:,} documents, {kind}, rows of {seq_len}"
            plan, seconds = _timed(make_plan, stretches, seq_len, limit, kind)
            rows += [_row(what, seconds, "s"), _row(f"{what}: utilisation", plan.utilisation, "share")]
            plan = make_plan(stretches, seq_len, limit, kind, ALIGN)
            rows.append(_row(f"{what}: utilisation with data.align={ALIGN}", plan.utilisation, "share"))
    return rows


def reading(config: Config, tokens: int) -> list[Row]:
    """Tokens per second of whole batches, one row each, from a memory map in the page cache; the median of three."""
    lengths = realistic_lengths(tokens // 1000)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), tokens))]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        np.random.default_rng(0).integers(0, 2**15, offsets[-1], np.uint16).tofile(path)
        manifest = {"hash": "synthetic", "sources": ["synthetic"]}
        content = np.memmap(path, np.uint16, mode="r")
        store = TokenStore(path.parent, "train", manifest, content, offsets, np.zeros(len(lengths), np.int32))
        for align in (1, ALIGN):
            data = dataclasses.replace(config.data, packing="best_fit", align=align, mixture={})
            for seq_len in LONG_TOKENS:
                loader = Loader(store, [Stage("all", 0, seq_len, 1, {}, 1.0)], data, seed=0)
                places = int(0.9 * tokens) // seq_len * seq_len
                _read(loader, places // 4 // seq_len)  # fills the page cache and makes the plan
                seconds = statistics.median(_timed(_read, loader, places // seq_len)[1] for _ in range(3))
                rows.append(_row(f"read packed rows of {seq_len}, data.align={align}", places / seconds, "tokens/s"))
    return rows


def _read(loader: Loader, steps: int) -> None:
    for step in range(steps):
        for _ in loader.micro_batches(step, 0, 1, 1):
            pass


def tokenising(config: Config) -> list[Row]:
    """Tokens per second on text of the configuration's corpus, document by document."""
    folder = prepare(config.data, config.model.vocab, runtime.log.info)
    store = TokenStore.open(folder, "train")
    tokenizer = Tokenizer.load(store.tokenizer)
    documents = max(1, int(np.searchsorted(store.offsets, TOKENIZED_TOKENS, side="right")) - 1)
    texts = [
        tokenizer.decode(store.tokens[a:b]) for a, b in zip(store.offsets[:documents], store.offsets[1:], strict=False)
    ]
    count, seconds = _timed(lambda: sum(len(tokenizer.encode(text)) for text in texts))
    what = f"tokenise {config.data.name}, {tokenizer.vocab} pieces"
    return [_row(what, count / seconds, "tokens/s"), _row(what, sum(map(len, texts)) / seconds, "characters/s")]


def _timed(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Result and CPU seconds of this process, which other work on the machine does not count into."""
    begin = time.process_time()
    result = work(*arguments)
    return result, time.process_time() - begin


def _row(what: str, value: float, unit: str) -> Row:
    runtime.log.info("%-72s %14s %s", what, f"{value:,.4f}" if value < 100 else f"{value:,.0f}", unit)
    return {"what": what, "value": value, "unit": unit, "cores": 1}
