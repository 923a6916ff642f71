"""Packed batches whose content is a function of the step alone, for any number of ranks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from nsa_train import runtime
from nsa_train.config.data_schema import DataConfig
from nsa_train.data.mixture import EVERYTHING, Mixture, Stream, groups_of
from nsa_train.data.pack import PACKING_KEYS, Plan, Stretches, aligned, documents_in_row, make_plan
from nsa_train.data.stages import Stage, largest_divisor
from nsa_train.data.store import TokenStore
from nsa_train.errors import ConfigError, DataError
from nsa_train.packing import Packing, to_device

NO_LABEL = -100
PADDING_TOKEN = 0
NO_SOURCE = -1
NO_DOCUMENT = -1
SAMPLED_STEPS = 16  # of a run, for the frequencies of its tokens and for a hash of what it reads


class Row(NamedTuple):
    """A packed row: its number in a plan."""

    plan: Plan
    number: int

    @property
    def pieces(self) -> slice:
        return slice(*self.plan.row_ptr[self.number : self.number + 2].tolist())


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank: T = rows x seq_len packed tokens.

    tokens   [T]  int64
    labels   [T]  int64, the next token; NO_LABEL at the last token of a document, or of a piece of one, and on padding
    packing       the pieces, each with its padding to a multiple of `data.align`; the padding of a row is one last
                  document of its own. Bounds are padded to rows x (documents in a row + 1) documents
    sources  [T]  int32, index into the manifest's sources, NO_SOURCE on padding
    places   [T]  int32, place in the whole document, of which the model may see a piece only; 0 on padding
    documents     of each of packing.lengths its document's number in the split, NO_DOCUMENT for padding
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    packing: Packing
    sources: torch.Tensor
    places: torch.Tensor
    documents: tuple[int, ...]

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            to_device(self.tokens, device),
            to_device(self.labels, device),
            self.packing.to(device),
            to_device(self.sources, device),
            to_device(self.places, device),
            self.documents,
        )

    def document_spans(self) -> Iterator[slice]:
        """Tokens of each document, padding left out. Waits for the device where the batch lies on one."""
        start = 0
        for length, document in zip(self.packing.lengths, self.documents, strict=True):
            if document != NO_DOCUMENT:
                yield slice(start, start + int((self.sources[start : start + length] != NO_SOURCE).sum()))
            start += length


class Loader:
    """Rows of one split in a seeded order, stage after stage. Holds no position: the step is the position."""

    def __init__(self, store: TokenStore, stages: Sequence[Stage], data: DataConfig, seed: int) -> None:
        """Raises DataError for a mixture that does not fit the corpus, and for a corpus smaller than one row.

        The held-out split is read in its own proportions, whatever the mixture, and may be smaller than a row.
        """
        self._store, self._data, self._seed = store, data, seed
        self._tokens = np.asarray(store.tokens)  # slices of a memory map itself cost more than copying them
        self._training = store.split == "train"
        self.stages = tuple(s if self._training else dataclasses.replace(s, mixture={}) for s in stages)
        self._names: list[str] = store.manifest["sources"]
        self._count = np.arange(max(stage.seq_len for stage in stages), dtype=np.int32)
        self._mixture = lru_cache(maxsize=None)(self._make_mixture)
        self.sample_sha256 = lru_cache(maxsize=None)(self._hash_sample)
        facts = [(s.first_step, s.seq_len, s.batch_rows, list(s.mixture.items())) for s in self.stages]
        identity = [store.hash, store.split, facts, [getattr(data, key) for key in PACKING_KEYS], seed]
        self.fingerprint: str = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self._check_sizes()

    # What a step reads ------------------------------------------------------------------------------------------------

    def stage(self, step: int) -> Stage:
        return self.stages[self._stage_number(step)]

    def step_rows(self, step: int) -> list[Row]:
        """Rows of a step, counted from 0, over all ranks. Epochs follow one another without a gap."""
        number = self._stage_number(step)
        stage, mixture = self.stages[number], self._mixture(number)
        first = (step - stage.first_step) * stage.batch_rows
        return [Row(*mixture.row(place)) for place in range(first, first + stage.batch_rows)]

    def label_tokens(self, step: int) -> int:
        """Labels in a step over all ranks; every rank knows it without asking the others."""
        return sum(int(plan.length[pieces].sum()) - (pieces.stop - pieces.start)
                   for plan, pieces in ((row.plan, row.pieces) for row in self.step_rows(step)))  # fmt: skip

    def micro_batches(self, step: int, rank: int, world: int, micro_rows: int) -> Iterator[Batch]:
        """This rank's share of a step in micro-batches of equal size; ranks and micro-batches do work alike.

        They hold the largest divisor of the rank's rows that is not above micro_rows. Raises ConfigError when the
        ranks cannot share the rows evenly.
        """
        rows = self.step_rows(step)
        if len(rows) % world:
            stage = self.stage(step)
            raise ConfigError(
                f"{len(rows)} rows of {stage.seq_len} tokens in a step are not a multiple of the {world} ranks"
            )
        mine = deal([int(row.plan.row_cost[row.number]) for row in rows], world)[rank]
        size = largest_divisor(len(mine), micro_rows)
        for at in range(0, len(mine), size):
            yield self._batch([rows[i] for i in mine[at : at + size]])

    def sequential(self, rows: int, rank: int, world: int, micro_rows: int, step: int = 0) -> Iterator[Batch]:
        """This rank's share of the first `rows` rows of an order that only a new stage changes; for validation.

        The order is a seeded shuffle, so few rows hold many documents. All ranks get as many batches, as ZeRO 3 needs:
        a rank that is short of a row gets one without labels. The last micro-batch may be smaller.
        """
        plan = self._mixture(self._stage_number(step)).streams[0].whole
        order = np.random.default_rng(runtime.seed_of(self._seed, "order", "validation")).permutation(plan.rows)
        order = order[:rows].tolist()
        mine, most = order[rank::world], -(-len(order) // world)
        for at in range(0, most, micro_rows):
            numbers = mine[at : at + micro_rows]
            filled = numbers + order[: min(micro_rows, most - at) - len(numbers)]
            batch = self._batch([Row(plan, number) for number in filled])
            batch.labels[len(numbers) * plan.seq_len :] = NO_LABEL
            yield batch

    # What a run has read ----------------------------------------------------------------------------------------------

    def tokens_read(self, steps: int) -> np.ndarray:
        """Tokens of each source in the first `steps` steps, int64 [sources]."""
        found = np.zeros(len(self._names), np.int64)
        for number, stage in enumerate(self.stages):
            rows = (min(steps, self._end(number, steps)) - stage.first_step) * stage.batch_rows
            if rows > 0:
                parts = self._mixture(number).of_streams(
                    rows, lambda stream, n: stream.tokens_by_source(n, self._store.sources, len(self._names))
                )
                found += sum(parts)
        return found

    def label_counts(self, steps: int, vocab: int) -> np.ndarray:
        """How often each token is a label in the sample of the first `steps` steps; int64 [vocab]."""
        counts = np.zeros(vocab, np.int64)
        for batch in self._sample(steps):
            counts += np.bincount(batch.labels[batch.labels != NO_LABEL].numpy(), minlength=vocab)
        return counts

    def _sample(self, steps: int) -> Iterator[Batch]:
        """All rows of SAMPLED_STEPS of the first `steps` steps, evenly spaced."""
        for step in np.linspace(0, steps - 1, min(steps, SAMPLED_STEPS)).astype(int).tolist():
            yield from self.micro_batches(step, 0, 1, micro_rows=1)

    def _hash_sample(self, steps: int) -> str:
        """Of tokens and document bounds in the sample: it tells what code made of a plan, which `fingerprint` does not.

        For any number of ranks; `sample_sha256` of a run is that of its trainer.steps.
        """
        digest = hashlib.sha256()
        for batch in self._sample(steps):
            digest.update(batch.tokens.numpy())
            digest.update(batch.packing.cu_seqlens.numpy())
        return digest.hexdigest()

    def epochs(self, steps: int) -> dict[str, float]:
        """How often the first `steps` steps read each source."""
        sizes = np.bincount(self._store.sources, weights=self._store.lengths, minlength=len(self._names))
        read = self.tokens_read(steps)
        return {name: read[i] / sizes[i] for i, name in enumerate(self._names) if sizes[i]}

    def streams(self, step: int) -> list[Stream]:
        """Plans of the stage that a step lies in, one per group of the mixture."""
        return self._mixture(self._stage_number(step)).streams

    def utilisation(self, step: int) -> float:
        """Share of the places in an epoch's rows that hold a token, 0 to 1, weighted by the mixture."""
        streams = self.streams(step)
        total = sum(s.group.weight for s in streams)
        return total / sum(s.group.weight / s.whole.utilisation for s in streams)

    def share_past(self, step: int, place: int) -> float:
        """Share of the tokens that the model sees at `place` of their document or later, weighted by the mixture."""
        streams = self.streams(step)
        total = sum(s.group.weight for s in streams)
        past = ((s.group.weight, np.maximum(s.whole.length - place, 0).sum() / s.whole.tokens) for s in streams)
        return float(sum(weight * share for weight, share in past) / total)

    @property
    def packing(self) -> str:
        return self._data.packing

    @property
    def longest_document(self) -> int:
        """Its tokens."""
        return int(self._store.lengths.max())

    @property
    def document_sources(self) -> np.ndarray:
        """Index into the manifest's sources of each document of the split, int32 [documents]."""
        return self._store.sources

    def state(self, step: int, steps: int) -> dict[str, Any]:
        """What a checkpoint keeps after `step` of `steps` steps. Only the step is needed to go on; the rest says what
        it means."""
        stage = self.stage(step)
        rows = (step - stage.first_step) * stage.batch_rows
        return {
            "step": step, "stage": stage.name, "rows_consumed": rows,
            "epoch": sum(self.tokens_read(step).tolist()) / int(self._store.offsets[-1]), "seed": self._seed,
            "fingerprint": self.fingerprint, "sample_sha256": self.sample_sha256(steps),
        }  # fmt: skip

    def check_state(self, state: dict[str, Any], steps: int) -> None:
        """Raise DataError unless a checkpoint of a run of `steps` steps is of this corpus, packing, batch and seed, and
        of code that makes the same rows of them."""
        if state["fingerprint"] != self.fingerprint:
            raise DataError(
                f"the checkpoint at step {state['step']} read other rows (fingerprint {state['fingerprint'][:12]}, now "
                f"{self.fingerprint[:12]}): the corpus, trainer.seq_len, trainer.batch_rows, the packing or mixture in "
                "data, stages or seed changed; set them back, or start under a new name"
            )
        if state.get("sample_sha256", self.sample_sha256(steps)) != self.sample_sha256(steps):  # none in older versions
            raise DataError(
                f"the checkpoint at step {state['step']} is of a version of nsa_train that packs or orders these rows "
                "in another way; go on with that version (`commit` in the run's manifest.json), or start under a new "
                "name"
            )

    # How it is made ---------------------------------------------------------------------------------------------------

    def _stage_number(self, step: int) -> int:
        return max(i for i, stage in enumerate(self.stages) if stage.first_step <= step)

    def _end(self, number: int, otherwise: int) -> int:
        return self.stages[number + 1].first_step if number + 1 < len(self.stages) else otherwise

    def _plan(self, stretches: Stretches, seq_len: int, copies: int) -> Plan:
        data = self._data
        limit = documents_in_row(data.max_documents, seq_len)
        return make_plan(stretches, seq_len, limit, data.packing, data.align, copies)

    def _make_mixture(self, number: int) -> Mixture:
        """The streams of a stage. They begin with what earlier stages left unread of each source's epoch."""
        stage, source_of = self.stages[number], self._store.sources
        left = self._unseen_before(number) if number else None
        streams = []
        for group in groups_of(stage.mixture, self._names):
            documents = np.flatnonzero(np.isin(source_of, group.sources))
            copies = self._data.long_copies if self._training else 1
            whole = self._plan(Stretches.whole(self._store.lengths, documents), stage.seq_len, copies)
            first = whole
            if left is not None:
                first = self._plan(left.only(np.isin(source_of[left.doc], group.sources)), stage.seq_len, 1)
            streams.append(Stream(group, first, whole, (self._seed, "order", number)))
        return Mixture(streams)

    def _unseen_before(self, number: int) -> Stretches:
        """What stages before this one left unread of the epochs in which they ended."""
        stage, mixture = self.stages[number - 1], self._mixture(number - 1)
        rows = (self.stages[number].first_step - stage.first_step) * stage.batch_rows
        parts = mixture.of_streams(rows, lambda stream, n: stream.unseen(n))
        read = {source for stream in mixture.streams for source in stream.group.sources}
        before = Stretches.whole(self._store.lengths) if number == 1 else self._unseen_before(number - 1)
        parts.append(before.only(~np.isin(self._store.sources[before.doc], sorted(read))))
        return Stretches.join(parts)

    def _check_sizes(self) -> None:
        sizes = np.bincount(self._store.sources, weights=self._store.lengths, minlength=len(self._names))
        for stage in self.stages if self._training else ():
            for group in groups_of(stage.mixture, self._names):
                if (tokens := int(sizes[list(group.sources)].sum())) < stage.seq_len:
                    what = "the corpus" if group.name == EVERYTHING else f"source {group.name}"
                    raise DataError(
                        f"{what} has {tokens} tokens, less than one row of {stage.seq_len}; shorten trainer.seq_len or "
                        "the stage's, or give more text"
                    )

    def _batch(self, rows: list[Row]) -> Batch:
        store, seq_len, align = self._store, rows[0].plan.seq_len, rows[0].plan.align
        kinds = (np.int64, np.int64, np.int32, np.int32)
        tokens, labels, sources, places = (np.empty(len(rows) * seq_len, kind) for kind in kinds)
        lengths: list[int] = []  # of the documents as the model sees them, padding included
        documents: list[int] = []
        for number, row in enumerate(rows):
            at, end = number * seq_len, (number + 1) * seq_len
            doc, start, length = (getattr(row.plan, key)[row.pieces] for key in ("doc", "start", "length"))
            numbers = (store.offsets[doc] + start, start, length, aligned(length, align), store.sources[doc])
            for begin, place, n, width, source in zip(*(values.tolist() for values in numbers), strict=True):
                tokens[at : at + n] = self._tokens[begin : begin + n]
                labels[at : at + n - 1] = tokens[at + 1 : at + n]
                labels[at + n - 1] = NO_LABEL
                sources[at : at + n] = source
                np.add(self._count[:n], place, out=places[at : at + n])
                if width > n:
                    _pad(slice(at + n, at + width), tokens, labels, sources, places)
                lengths.append(width)
                at += width
            documents += doc.tolist()
            if at < end:
                _pad(slice(at, end), tokens, labels, sources, places)
                lengths.append(end - at)
                documents.append(NO_DOCUMENT)
        limit = documents_in_row(self._data.max_documents, seq_len)
        packing = Packing.from_lengths(lengths, documents=len(rows) * (limit + 1))
        tokens, labels, sources, places = map(torch.from_numpy, (tokens, labels, sources, places))
        return Batch(tokens, labels, packing, sources, places, tuple(documents))


def _pad(hole: slice, tokens: np.ndarray, labels: np.ndarray, sources: np.ndarray, places: np.ndarray) -> None:
    tokens[hole], labels[hole], sources[hole], places[hole] = PADDING_TOKEN, NO_LABEL, NO_SOURCE, 0


def deal(costs: Sequence[int], world: int) -> list[list[int]]:
    """For each rank the indices of its rows: equally many, total costs alike, and alike at each place of the lists.

    The dearest `world` rows are dealt first, one to each rank, the dearest of them to the rank that has least so far.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    hands: list[list[int]] = [[] for _ in range(world)]
    totals = [0] * world
    for at in range(0, len(order), world):
        ranks = sorted(range(world), key=lambda rank: (totals[rank], rank))
        for rank, row in zip(ranks, order[at : at + world], strict=True):
            hands[rank].append(row)
            totals[rank] += costs[row]
    return hands
