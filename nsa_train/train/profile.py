"""`profile=trace`: a trace of a few steps, for Perfetto or chrome://tracing, and a table of where their time goes.

Time counts for the part whose name (`record_function` in the model and the engine) is the nearest around it, and that
of a backward pass for the part of its forward operation. On a GPU it is the time of kernels, on a CPU that
of operations. What is left of a step's wall time is the GPU waiting for the host.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from nsa_train.config.schema import ProfileConfig

PARTS = ("embedding", "attention", "norms", "router", "experts", "dense MLP", "head", "optimizer")
DENSE = ("attention, full", "attention, win")  # inside "attention": library kernels, of which no name tells the part
NAMES = {*PARTS, *DENSE}
KERNELS = {  # beginnings of kernels' names that say more than the part around them
    "_compressed": "attention, cmp", "_importance": "attention, selection", "_topn": "attention, selection",
    "_selected": "attention, slc", "_win": "attention, win", "_combine": "attention, gates", "nccl": "communication",
}  # fmt: skip
OTHER, DATA, HOST = "other", "data", "waiting for the host"
BACKWARD = "autograd::engine::evaluate_function"  # around what one node of the graph does
BACKWARD_SCOPE = 1  # the node itself: RecordScope::BACKWARD_FUNCTION


class StepProfiler:
    """Called at the end of every step of one process; writes when its steps are over."""

    def __init__(self, config: ProfileConfig, folder: Path, device: torch.device) -> None:
        self.config, self.folder, self.device = config, folder, device
        self.report: dict[str, Any] | None = None
        self._number, self._waited, self._started = 0, 0.0, 0.0
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._profile = profile(
            activities=activities, schedule=schedule(wait=config.skip, warmup=1, active=config.steps, repeat=1)
        )
        self._profile.start()

    def step(self, waited_s: float) -> str | None:
        """`waited_s`: for data, in this step. Gives the table after the last profiled step, else None."""
        if self.report:
            return None
        if self._number >= self.config.skip:
            self._synchronize()
        if self._number == self.config.skip:
            self._started = time.perf_counter()
        if self._number > self.config.skip:
            self._waited += waited_s
        if self._number == self.config.skip + self.config.steps:
            return self._finish(time.perf_counter() - self._started)
        self._number += 1
        self._profile.step()
        return None

    def stop(self) -> None:
        """A launch ends: the process would crash at its exit if it still recorded."""
        if not self.report:
            self._profile.stop()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _finish(self, seconds: float) -> str:
        self._profile.stop()
        steps = self.config.steps
        on_gpu = self.device.type == "cuda"
        parts = {part: us / 1e3 / steps for part, us in time_by_part(self._profile.events(), on_gpu).items()}
        parts[DATA], step_ms = 1e3 * self._waited / steps, 1e3 * seconds / steps
        if on_gpu:
            parts[HOST] = max(0.0, step_ms - sum(parts.values()))
        parts = dict(sorted(parts.items(), key=lambda item: -item[1]))
        self.report = {"steps": steps, "step_ms": step_ms, "parts": parts}
        self.folder.mkdir(exist_ok=True)
        (self.folder / "parts.json").write_text(json.dumps(self.report, indent=1) + "\n")
        self._profile.export_chrome_trace(str(self.folder / "trace.json.gz"))
        return table(step_ms, parts)


def time_by_part(events: Iterable[Any], on_gpu: bool) -> dict[str, float]:
    """Microseconds of each part, from the events of a profile: of kernels, or of operations on a CPU."""
    found: dict[str, float] = defaultdict(float)
    for event, part in with_parts(events):
        if on_gpu:
            for kernel in event.kernels:
                found[next((p for start, p in KERNELS.items() if kernel.name.startswith(start)), part)] += (
                    kernel.duration
                )
        elif event.name not in NAMES and not event.name.startswith("ProfilerStep"):
            found[part] += event.self_cpu_time_total
    return dict(found)


def with_parts(events: Iterable[Any]) -> Iterator[tuple[Any, str]]:
    """The host's events of a profile, in order, each with its part."""
    on_cpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    on_cpu.sort(key=lambda event: event.time_range.start)
    # (thread, sequence number) -> part: the last operation with a number is the one that recorded it. Each thread has
    # numbers of its own, and on a GPU the backward pass, with what is recomputed in it, is in another one.
    forward: dict[tuple[int, int], str] = {}
    for event in on_cpu:
        if event.sequence_nr >= 0 and not event.name.startswith(BACKWARD) and event.scope != BACKWARD_SCOPE:
            forward[event.thread, event.sequence_nr] = _part(event, {})
    for event in on_cpu:
        yield event, _part(event, forward)


def _part(event: Any, forward: dict[tuple[int, int], str]) -> str:
    """The nearest name around an event; of a backward operation, the part of its forward one."""
    at = event
    while at is not None:
        if at.name in NAMES:
            return at.name
        if at.name.startswith(BACKWARD) and (of := forward.get((at.fwd_thread, at.sequence_nr))):
            return of
        at = at.cpu_parent
    return OTHER


def table(step_ms: float, parts: dict[str, float]) -> str:
    """For people."""
    lines = [f"a step of {step_ms:,.1f} ms, by part"]
    lines += [f"  {part:22}{ms:>10,.2f} ms{ms / step_ms:>8.1%}" for part, ms in parts.items()]
    return "\n".join(lines)
