"""Tokenising in processes: documents go in as shards of text, one finished file of tokens comes out for each.

A shard's file appears as a whole or not at all, so what a killed preparation leaves behind can be trusted.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nsa_train import runtime
from nsa_train.data.selection import SPLITS, Split
from nsa_train.data.tokenizer import Tokenizer
from nsa_train.errors import Interrupted

SHARD_CHARACTERS = 4 << 20
SHARDS_AHEAD = 2  # per process, read but not yet tokenised


@dataclass(frozen=True)
class Shard:
    """Consecutive pieces of a split's documents; `ends` says which of them are the last of their document."""

    split: Split
    number: int
    texts: list[str] = field(default_factory=list)
    ends: list[bool] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of its file: with a digest of the text, so that no file is ever taken for that of another text."""
        digest = hashlib.blake2b(digest_size=8)
        for text, end in zip(self.texts, self.ends, strict=True):
            digest.update(text.encode() + (b"\1" if end else b"\0"))
        return f"{self.split}-{self.number:06}-{digest.hexdigest()}.npy"


@dataclass(frozen=True)
class Work:
    """What a shard cost: its tokens, and the processor's seconds and peak memory of the process behind it."""

    tokens: int
    cpu_s: float
    peak_bytes: int


def shards_of(texts: Iterable[tuple[Split, str]], split_documents: bool) -> Iterator[Shard]:
    """Texts in shards of about SHARD_CHARACTERS; a longer text is cut at newlines where that is allowed."""
    filling = {split: Shard(split, 0) for split in SPLITS}
    room = dict.fromkeys(SPLITS, SHARD_CHARACTERS)
    for split, text in texts:
        start = 0
        while start < len(text):
            shard, stop = filling[split], len(text)
            if split_documents and stop - start > room[split]:
                stop = text.find("\n", start + room[split] - 1) + 1 or stop
            shard.texts.append(text[start:stop])
            shard.ends.append(stop == len(text))
            room[split] -= stop - start
            if room[split] <= 0:
                yield shard
                filling[split], room[split] = Shard(split, shard.number + 1), SHARD_CHARACTERS
            start = stop
    yield from (shard for shard in filling.values() if shard.texts)


def tokenise(
    shards: Iterable[Shard], folder: Path, tokenizer: Path, dtype: np.dtype, workers: int,
    done: Callable[[Shard, Work | None], None],
) -> dict[Split, list[Path]]:  # fmt: skip
    """Write every shard that `folder` lacks, with so many processes; the files of each split in their order.

    `done` hears of each, in order, without its cost where it was there before. Memory is bounded by the shards of all
    processes. Raises OSError where the disk is full, Interrupted where a process was killed.
    """
    files: dict[Split, list[Path]] = {split: [] for split in SPLITS}
    waiting: deque[tuple[Shard, Future[Work] | None]] = deque()
    pool: Executor = _here(tokenizer) if workers == 1 else _processes(workers, tokenizer)

    def settle(limit: int) -> None:
        while len(waiting) > limit:
            shard, future = waiting.popleft()
            done(shard, future.result() if future else None)
            runtime.fault_point("prepare.shard")

    try:
        for shard in shards:
            file = folder / shard.name
            files[shard.split].append(file)
            waiting.append((shard, None if file.exists() else pool.submit(_write, shard, file, dtype)))
            settle(workers * SHARDS_AHEAD)
        settle(0)
    except BrokenProcessPool as error:
        raise Interrupted(
            "a tokenising process was killed, perhaps for its memory, or could not start; the same command goes on "
            "where it stopped, and data.workers=1 needs least memory and no other process"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    return files


def read_shard(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [tokens] of a shard, lengths [pieces] int64 and ends [pieces] bool of its pieces."""
    with file.open("rb") as opened:
        lengths, ends, tokens = (np.load(opened, allow_pickle=False) for _ in range(3))
    return tokens, lengths, ends


def _here(tokenizer: Path) -> Executor:
    """A single thread of this process, for a small corpus or little memory."""
    return ThreadPoolExecutor(1, initializer=_load, initargs=(tokenizer,))


def _processes(workers: int, tokenizer: Path) -> Executor:
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of a training process's threads
    return ProcessPoolExecutor(workers, context, initializer=_start, initargs=(tokenizer,))


def _start(tokenizer: Path) -> None:
    """Begin a worker process: it leaves Ctrl-C to its parent, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _load(tokenizer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


_local = threading.local()  # the tokenizer of a worker


def _load(tokenizer: Path) -> None:
    _local.tokenizer = Tokenizer.load(tokenizer)


def _write(shard: Shard, target: Path, dtype: np.dtype) -> Work:
    started = time.thread_time()
    tokenizer: Tokenizer = _local.tokenizer
    ids = []
    for text, end in zip(shard.texts, shard.ends, strict=True):
        ids.append(tokenizer.encode(text).astype(dtype))
        if end:
            ids[-1] = np.append(ids[-1], dtype.type(tokenizer.eos))
    unfinished = target.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        np.save(file, np.array([len(piece) for piece in ids], np.int64))
        np.save(file, np.array(shard.ends))
        np.save(file, np.concatenate(ids))
        file.flush()
        os.fsync(file.fileno())
    runtime.fault_point("shard.write")
    unfinished.rename(target)
    return Work(sum(map(len, ids)), time.thread_time() - started, runtime.peak_resident_bytes())
