"""Packed batches whose content is a function of the step alone, for any number of ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from nsa_train import runtime
from nsa_train.data.pack import make_plan
from nsa_train.data.store import TokenStore
from nsa_train.errors import ConfigError, DataError
from nsa_train.packing import Packing

NO_LABEL = -100
PADDING_TOKEN = 0
NO_SOURCE = -1


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank: T = rows x seq_len packed tokens.

    tokens   [T]  int64
    labels   [T]  int64, the next token; NO_LABEL at the last token of a document, or of a piece of one, and on padding
    packing       the pieces; the padding of a row is one last document of its own. Bounds are padded to
                  rows x (max_documents + 1) documents
    sources  [T]  int32, index into the manifest's sources, NO_SOURCE on padding
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    packing: Packing
    sources: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            self.tokens.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.packing.to(device),
            self.sources.to(device, non_blocking=True),
        )


class Loader:
    """Rows of one split in a seeded order, epoch after epoch. Holds no position: the step is the position."""

    def __init__(self, store: TokenStore, seq_len: int, max_documents: int, batch_rows: int, seed: int) -> None:
        self._store, self._seed = store, seed
        self._seq_len, self._max_documents, self._batch_rows = seq_len, max_documents, batch_rows
        self._plan = make_plan(store.lengths, seq_len, max_documents)
        tokens_before = np.concatenate([[0], np.cumsum(self._plan.length, dtype=np.int64)])
        self._row_tokens = np.diff(tokens_before[self._plan.row_ptr])
        self._order = lru_cache(maxsize=2)(self._permutation)  # a step may end one epoch and begin the next
        identity = [store.hash, store.split, seq_len, max_documents, batch_rows, seed]
        self.fingerprint: str = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    @property
    def rows(self) -> int:
        """Rows in an epoch."""
        return self._plan.rows

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of the split, without padding."""
        return self._plan.tokens

    @property
    def utilisation(self) -> float:
        """Share of an epoch's places that hold a token, 0 to 1."""
        return self._plan.utilisation

    @property
    def corpus_hash(self) -> str:
        return self._store.hash

    def step_rows(self, step: int) -> list[int]:
        """Rows of a step, counted from 0, over all ranks. Epochs follow one another without a gap."""
        places = range(step * self._batch_rows, (step + 1) * self._batch_rows)
        return [int(self._order(place // self.rows)[place % self.rows]) for place in places]

    def label_tokens(self, step: int) -> int:
        """Labels in a step over all ranks; every rank knows it without asking the others."""
        rows = np.array(self.step_rows(step))
        pieces = self._plan.row_ptr[rows + 1] - self._plan.row_ptr[rows]
        return int((self._row_tokens[rows] - pieces).sum())

    def micro_batches(self, step: int, rank: int, world: int, micro_rows: int) -> Iterator[Batch]:
        """This rank's share of a step: rows rank, rank + world, ... in micro-batches of equal size.

        They hold the largest divisor of the rank's rows that is not above micro_rows. Raises ConfigError when the
        ranks cannot share the rows evenly.
        """
        if self._batch_rows % world:
            raise ConfigError(f"trainer.batch_rows={self._batch_rows} is not a multiple of the {world} ranks")
        mine = self.step_rows(step)[rank::world]
        size = largest_divisor(len(mine), micro_rows)
        for at in range(0, len(mine), size):
            yield self._batch(mine[at : at + size])

    def sequential(self, rows: int, rank: int, world: int, micro_rows: int) -> Iterator[Batch]:
        """This rank's share of the first `rows` rows of an order that never changes; for validation.

        The order is a seeded shuffle, so few rows hold many documents. Ranks may get a row more or less than others,
        or none; the last micro-batch may be smaller.
        """
        mine = self._order("validation")[:rows][rank::world].tolist()
        for at in range(0, len(mine), micro_rows):
            yield self._batch(mine[at : at + micro_rows])

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps after `step` steps."""
        return {"step": step, "rows_consumed": step * self._batch_rows, "fingerprint": self.fingerprint}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise DataError unless a checkpoint's state belongs to this corpus, packing, batch and seed."""
        if state["fingerprint"] != self.fingerprint:
            raise DataError(
                f"the checkpoint at step {state['step']} read other rows (fingerprint {state['fingerprint'][:12]}, now "
                f"{self.fingerprint[:12]}): the corpus, trainer.seq_len, trainer.batch_rows, data.max_documents or "
                "seed changed; set them back, or start under a new name"
            )

    def _permutation(self, epoch: int | str) -> np.ndarray:
        return np.random.default_rng(runtime.seed_of(self._seed, "order", epoch)).permutation(self.rows)

    def _batch(self, rows: list[int]) -> Batch:
        plan, store = self._plan, self._store
        size = len(rows) * self._seq_len
        tokens = np.full(size, PADDING_TOKEN, np.int64)
        labels = np.full(size, NO_LABEL, np.int64)
        sources = np.full(size, NO_SOURCE, np.int32)
        lengths: list[int] = []
        for number, row in enumerate(rows):
            at = number * self._seq_len
            for piece in range(plan.row_ptr[row], plan.row_ptr[row + 1]):
                doc, length = int(plan.doc[piece]), int(plan.length[piece])
                begin = int(store.offsets[doc] + plan.start[piece])
                tokens[at : at + length] = store.tokens[begin : begin + length]
                labels[at : at + length - 1] = tokens[at + 1 : at + length]
                sources[at : at + length] = store.sources[doc]
                lengths.append(length)
                at += length
            if padding := (number + 1) * self._seq_len - at:
                lengths.append(padding)
        packing = Packing.from_lengths(lengths, documents=len(rows) * (self._max_documents + 1))
        return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), packing, torch.from_numpy(sources))


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return max(size for size in range(1, min(number, limit) + 1) if number % size == 0)
