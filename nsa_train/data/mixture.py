"""Which source each row comes from: token weights, exact in every window of rows, from the row's number alone."""

from __future__ import annotations

import fnmatch
import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nsa_train import runtime
from nsa_train.data.pack import Plan, Stretches
from nsa_train.errors import DataError

EVERYTHING = "all"  # name of the one stream where no mixture is asked for


@dataclass(frozen=True)
class Group:
    """Sources that share one weight; `sources` are their numbers in the manifest."""

    name: str
    weight: float
    sources: tuple[int, ...]


def groups_of(mixture: Mapping[str, float], names: Sequence[str]) -> list[Group]:
    """Groups with a positive weight. Keys are names of sources or patterns such as books/*; the first match counts.

    An empty mixture is one group of all sources, in the proportions that the corpus has.
    Raises DataError for a key without a source and for a source without a key: nothing is left out unsaid.
    """
    if not mixture:
        return [Group(EVERYTHING, 1.0, tuple(range(len(names))))]
    members: dict[str, list[int]] = {key: [] for key in mixture}
    homeless: list[int] = []
    for number, name in enumerate(names):
        key = next((key for key in mixture if fnmatch.fnmatchcase(name, key)), None)
        (homeless if key is None else members[key]).append(number)
    if unused := [key for key, found in members.items() if not found]:
        raise DataError(f"data.mixture names {', '.join(unused)}, but the corpus has only {_some(names)}")
    if homeless:
        raise DataError(
            f"data.mixture has no weight for {_some([names[number] for number in homeless])}; "
            "give one, 0 leaves a source out"
        )
    return [Group(key, weight, tuple(members[key])) for key, weight in mixture.items() if weight > 0]


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} others" if len(names) > most else "")


class Shares:
    """Deals the numbers 0, 1, 2, ... to streams by their weights, without memory.

    A binary tree, light streams deepest; each node passes round(n * share) of its first n numbers to its left side.
    So after any number of rows each stream is less than two rows away from its share.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        heap: list[tuple[float, int, object]] = [(weight, i, i) for i, weight in enumerate(weights)]
        heapq.heapify(heap)
        for tie in range(len(weights), 2 * len(weights) - 1):
            light, _, right = heapq.heappop(heap)
            heavy, _, left = heapq.heappop(heap)
            heapq.heappush(heap, (light + heavy, tie, (heavy / (light + heavy), left, right)))
        self._streams, self._root = len(weights), heap[0][2]

    def place(self, number: int) -> tuple[int, int]:
        """The stream of a number, and how many smaller numbers it has."""
        node = self._root
        while isinstance(node, tuple):
            share, left, right = node
            before = _rounded(number, share)
            if _rounded(number + 1, share) > before:
                node, number = left, before
            else:
                node, number = right, number - before
        assert isinstance(node, int)
        return node, number

    def counts(self, numbers: int) -> list[int]:
        """How many of the first `numbers` each stream has."""
        found = [0] * self._streams
        open_nodes = [(self._root, numbers)]
        while open_nodes:
            node, count = open_nodes.pop()
            if isinstance(node, tuple):
                share, left, right = node
                open_nodes += [(left, _rounded(count, share)), (right, count - _rounded(count, share))]
            else:
                assert isinstance(node, int)
                found[node] = count
        return found


def _rounded(count: int, share: float) -> int:
    return int(count * share + 0.5)


class Stream:
    """The rows of one group without end: what is left of an epoch, then epoch after epoch, each in another order."""

    def __init__(self, group: Group, left: Plan, whole: Plan, seed: tuple[object, ...]) -> None:
        self.group, self.left, self.whole = group, left, whole
        self._seed = seed
        self._order = lru_cache(maxsize=3)(self._permutation)  # a step may end one epoch and begin the next

    def row(self, place: int) -> tuple[Plan, int]:
        """Plan and row at a place of the stream."""
        epoch, plan, at = self._find(place)
        return plan, int(self._order(epoch, plan.rows)[at])

    def unseen(self, rows: int) -> Stretches:
        """What the first `rows` rows leave of the epoch that they end in; nothing where they end it."""
        epoch, plan, at = self._find(rows)
        if at == 0 and rows:
            return Stretches.whole(np.zeros(0, np.int64))
        chosen = np.ones(plan.rows, bool)
        chosen[self._order(epoch, plan.rows)[:at]] = False
        mask = plan.pieces_of(chosen)
        return Stretches.join([Stretches(plan.doc[mask], plan.start[mask], plan.length[mask])])

    def tokens_by_source(self, rows: int, source_of: np.ndarray, sources: int) -> np.ndarray:
        """Tokens of each source in the first `rows` rows, int64 [sources]."""

        def count(plan: Plan, mask: np.ndarray | slice) -> np.ndarray:
            weights = plan.length[mask]
            return np.bincount(source_of[plan.doc[mask]], weights=weights, minlength=sources).astype(np.int64)

        epoch, plan, at = self._find(rows)
        chosen = np.zeros(plan.rows, bool)
        chosen[self._order(epoch, plan.rows)[:at]] = True
        found = count(plan, plan.pieces_of(chosen))
        if epoch:
            found += count(self.left, slice(None)) + (epoch - 1) * count(self.whole, slice(None))
        return found

    def _find(self, place: int) -> tuple[int, Plan, int]:
        """Epoch (0 is what was left of one), its plan, and the place inside."""
        if place < self.left.rows:
            return 0, self.left, place
        epoch, at = divmod(place - self.left.rows, self.whole.rows)
        return epoch + 1, self.whole, at

    def _permutation(self, epoch: int, rows: int) -> np.ndarray:
        return np.random.default_rng(runtime.seed_of(*self._seed, self.group.name, epoch)).permutation(rows)


class Mixture:
    """The rows of a stage, from all its streams."""

    def __init__(self, streams: list[Stream]) -> None:
        """A stream's share of the rows is its token weight over the tokens in one of its rows."""
        self.streams = streams
        self._shares = Shares([s.group.weight * s.whole.rows / s.whole.tokens for s in streams])

    def row(self, number: int) -> tuple[Plan, int]:
        stream, place = self._shares.place(number)
        return self.streams[stream].row(place)

    def of_streams(self, rows: int, ask: Callable[[Stream, int], object]) -> list:
        """`ask(stream, its rows)` for each stream, of the first `rows` rows."""
        return [ask(stream, count) for stream, count in zip(self.streams, self._shares.counts(rows), strict=True)]
