"""Timing of functions on a GPU, side by side, and the error of what they give."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

QUEUED_CYCLES = 40_000_000  # about 25 ms: launches queue up behind this, so that the host's time does not show
Timed = Callable[[], Any]
FAILURES = (RuntimeError, ValueError, TypeError, ImportError)  # of an implementation that cannot run here


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def peak_gib(work: Timed) -> float:
    """Memory that it takes beside what is held before it, at its most."""
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return (torch.cuda.max_memory_allocated() - held) / 2**30


def take_turns(timed: dict[Any, Timed], seconds: float, max_turns: int) -> dict[Any, list[float]]:
    """Milliseconds of each function, all taking turns until `seconds` are over (at least 3 turns)."""
    found: dict[Any, list[float]] = {key: [] for key in timed}
    for function in timed.values():
        function()
    torch.cuda.synchronize()
    deadline = time.perf_counter() + seconds
    for turn in range(max_turns):
        for key, function in timed.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(QUEUED_CYCLES)
            start.record()
            function()
            end.record()
            end.synchronize()
            found[key].append(start.elapsed_time(end))
        if turn >= 2 and time.perf_counter() > deadline:
            break
    return found


def spread(ms: list[float]) -> dict[str, Any]:
    """What a row says of its turns."""
    return {"ms": statistics.median(ms), "ms_min": min(ms), "ms_max": max(ms), "turns": len(ms)}


def side_by_side(
    makes: Mapping[str, Callable[[], Timed]], error_of: Callable[[Any], float], seconds: float
) -> dict[str, dict[str, Any]]:
    """Figures of each implementation: error, memory and times; of one that cannot run `error` in their place.

    makes     gives what is timed
    error_of  of what that gives
    """
    rows: dict[str, dict[str, Any]] = {}
    works: dict[str, Timed] = {}
    for impl, make in makes.items():
        try:
            work = make()
            rows[impl] = {"rel_err": error_of(work()), "peak_gib": peak_gib(work)}
            works[impl] = work
        except FAILURES as error:
            rows[impl] = {"error": str(error)[:300]}
    for impl, ms in take_turns(works, seconds, max_turns=50).items():
        rows[impl] |= spread(ms)
    return rows
