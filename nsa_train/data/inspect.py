"""What a corpus and its packed rows look like, for a person: `nsa-train data inspect step=120 row=3`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from nsa_train import runtime
from nsa_train.config.schema import Config
from nsa_train.data.loader import Loader, Row
from nsa_train.data.prepare import prepare
from nsa_train.data.stages import stages_of
from nsa_train.data.store import TokenStore
from nsa_train.data.tokenizer import Tokenizer
from nsa_train.errors import ConfigError

BAR = 40  # characters of the longest bar
MOST_SOURCES = 20  # in a table
MOST_DOCUMENTS = 100_000  # compared as wholes
MOST_TOKENS = 1 << 24  # of a split whose passages are compared
PASSAGE_TOKENS = 32
PASSAGES_KEPT = 16  # one passage in so many is compared, chosen by its content


@dataclass(frozen=True)
class Question:
    """step  as metrics.jsonl counts: 1 is the first; row  of the step, from 1; show  tokens at a document's ends"""

    step: int = 1
    row: int = 1
    show: int = 40

    @staticmethod
    def parse(words: Sequence[str]) -> tuple[Question, list[str]]:
        """The question in `step=`, `row=` and `show=`, and the other words, which are about the configuration."""
        asked: dict[str, int] = {}
        others = []
        for word in words:
            key, _, value = word.partition("=")
            if key not in ("step", "row", "show"):
                others.append(word)
            elif value.isdecimal() and int(value) > 0:
                asked[key] = int(value)
            else:
                raise ConfigError(f"{word}: {key} must be a number from 1 on")
        return Question(**asked), others


def inspect(config: Config, question: Question) -> Iterator[str]:
    """The report, line by line. Prepares the corpus if that has not been done."""
    folder = prepare(config.data, config.model.vocab, runtime.log.info)
    train, heldout = (TokenStore.open(folder, split) for split in ("train", "heldout"))
    loader = Loader(train, stages_of(config), config.data, config.seed)
    rows = loader.step_rows(question.step - 1)
    if question.row > len(rows):
        raise ConfigError(f"row={question.row}: step {question.step} has {len(rows)} rows")
    yield f"corpus {config.data.name} {train.hash[:12]} in {folder}"
    yield from _lengths(train)
    yield from _duplicates(train, heldout)
    yield from _packing(loader, question.step)
    yield from _mixture(loader, train, question.step)
    yield from _step(rows, question.step)
    yield from _row(rows[question.row - 1], train, Tokenizer.load(train.tokenizer), question)


def _lengths(store: TokenStore) -> Iterator[str]:
    lengths = store.lengths
    power = np.frexp(lengths)[1] - 1
    documents, tokens = np.bincount(power), np.bincount(power, weights=lengths)
    yield ""
    yield f"{len(lengths):,} training documents, {int(lengths.sum()):,} tokens, by length"
    for i in np.flatnonzero(documents):
        share = tokens[i] / tokens.sum()
        bar = "#" * round(BAR * tokens[i] / tokens.max())
        yield f"  {2**i:>9,} - {2 ** (i + 1) - 1:<10,} {documents[i]:>10,} documents {share:>6.1%} of tokens  {bar}"


def _duplicates(train: TokenStore, heldout: TokenStore) -> Iterator[str]:
    documents = [_whole_documents(store) for store in (train, heldout)]
    passages = [_passages(store) for store in (train, heldout)]
    _, counts = np.unique(passages[0], return_counts=True)
    again = int(counts[counts > 1].sum()) / max(len(passages[0]), 1)
    shared = float(np.isin(passages[1], passages[0]).mean()) if len(passages[1]) else 0.0
    yield ""
    yield f"duplicates (of the first {MOST_DOCUMENTS:,} documents and {MOST_TOKENS:,} tokens of a split at most)"
    yield f"  {len(documents[0]) - len(set(documents[0])):,} training documents equal an earlier one"
    yield f"  {len(set(documents[0]) & set(documents[1])):,} held-out documents equal a training document"
    yield f"  {again:.2%} of training passages of {PASSAGE_TOKENS} tokens occur more than once"
    yield f"  {shared:.2%} of held-out passages of {PASSAGE_TOKENS} tokens occur in the training split"


def _whole_documents(store: TokenStore) -> list[bytes]:
    bounds = store.offsets[: MOST_DOCUMENTS + 1].tolist()
    return [hashlib.sha256(store.tokens[a:b].tobytes()).digest() for a, b in pairwise(bounds)]


def _passages(store: TokenStore) -> np.ndarray:
    """Hashes of passages, uint64. Which are kept depends on their tokens alone, so copies are kept together."""
    value = np.asarray(store.tokens[:MOST_TOKENS]).astype(np.uint64)
    value = (value + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    width = 1
    while width < PASSAGE_TOKENS:
        value = value[:-width] * np.uint64(0xD6E8FEB86659FD93 + 2 * width) + value[width:]
        value ^= value >> np.uint64(32)
        width *= 2
    return value[value % np.uint64(PASSAGES_KEPT) == 0]


def _packing(loader: Loader, step: int) -> Iterator[str]:
    stage = loader.stage(step - 1)
    yield ""
    place = f"stage {stage.name}, from step {stage.first_step + 1}"
    yield f"rows of {stage.seq_len} tokens, {stage.batch_rows} in a step ({place}; data.packing={loader.packing})"
    for stream in loader.streams(step - 1):
        plan = stream.whole
        pieces = np.diff(plan.row_ptr)
        cost = np.percentile(plan.row_cost / plan.seq_len**2, (5, 50, 95))
        yield (
            f"  {stream.group.name}: {plan.rows:,} rows an epoch, {plan.utilisation:.3%} full "
            f"({plan.utilisation_before_alignment:.3%} before alignment), "
            f"{np.median(pieces):.0f} documents in a row, {pieces.max()} at most; work of a row against one document's "
            f"that fills it: {cost[0]:.2f} / {cost[1]:.2f} / {cost[2]:.2f} (5% / median / 95%)"
        )


def _mixture(loader: Loader, store: TokenStore, step: int) -> Iterator[str]:
    read, epochs = loader.tokens_read(step), loader.epochs(step)
    names = store.manifest["sources"]
    weight = {}
    streams = loader.streams(step - 1)
    for stream in streams:
        for source in stream.group.sources:
            weight[source] = stream.group
    total = sum(stream.group.weight for stream in streams)
    yield ""
    yield f"read in {step} steps"
    largest = np.argsort(-read, kind="stable")[:MOST_SOURCES].tolist()
    for source in largest:
        group = weight.get(source)
        wanted = f"{group.name} {group.weight / total:.1%}" if group else "left out"
        yield (
            f"  {names[source]:<28.28} {read[source]:>14,} tokens {read[source] / read.sum():>7.2%}  "
            f"{epochs.get(names[source], 0.0):>8.3f} epochs  (weight now: {wanted})"
        )
    if len(names) > MOST_SOURCES:
        yield f"  and {len(names) - MOST_SOURCES} smaller ones"


def _step(rows: list[Row], step: int) -> Iterator[str]:
    yield ""
    yield f"step {step}: documents by row (number:first token-last token of the document)"
    for number, row in enumerate(rows, start=1):
        doc, start, length = _pieces(row)
        parts = [f"{d}:{s}-{s + n - 1}" for d, s, n in zip(doc, start, length, strict=True)]
        yield f"  row {number}: {sum(length)} tokens in {len(doc)} documents: {' '.join(parts)}"


def _row(row: Row, store: TokenStore, tokenizer: Tokenizer, question: Question) -> Iterator[str]:
    yield ""
    yield f"step {question.step}, row {question.row} as text"
    used = 0
    for doc, start, length in zip(*_pieces(row), strict=True):
        size = int(store.lengths[doc])
        source = store.manifest["sources"][store.sources[doc]]
        ends = ("begins" if start == 0 else "goes on") + (", ends" if start + length == size else ", is cut")
        yield f"──── document {doc} of {source}: tokens {start}-{start + length - 1} of {size}; {ends} ────"
        begin = int(store.offsets[doc]) + start
        tokens = store.tokens[begin : begin + length]
        if length <= 2 * question.show:
            yield tokenizer.decode(tokens)
        else:
            yield tokenizer.decode(tokens[: question.show])
            yield f"     ... {length - 2 * question.show} tokens ..."
            yield tokenizer.decode(tokens[-question.show :])
        used += length
    yield f"──── {row.plan.seq_len - used} places of padding ────"


def _pieces(row: Row) -> tuple[list[int], list[int], list[int]]:
    plan, pieces = row.plan, row.pieces
    return plan.doc[pieces].tolist(), plan.start[pieces].tolist(), plan.length[pieces].tolist()
