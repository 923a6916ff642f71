"""How far a long pass has come: a bar on a terminal, a line every few seconds anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

EVERY_S = 5.0


class Meter:
    """Counts bytes of text, of `total` where that is known, and tokens. A context manager."""

    def __init__(self, label: str, say: Callable[[str], None], total: int | None = None) -> None:
        self._label, self._say, self._total = label, say, total
        self._bytes = self._tokens = 0
        self._bar: Any = None

    def __enter__(self) -> Meter:
        self._started = self._said = time.monotonic()
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            columns = ("{task.description}", progress.BarColumn(20), progress.DownloadColumn(), "{task.fields[speed]}",
                       progress.TimeRemainingColumn())  # fmt: skip
            self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self._label, total=self._total, speed="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        if error is None:
            self._say(self._line())

    def add(self, size: int, tokens: int = 0) -> None:
        self._bytes += size
        self._tokens += tokens
        if self._bar:
            self._bar.update(self._task, completed=self._bytes, speed=self._speed())
        elif time.monotonic() - self._said > EVERY_S:
            self._said = time.monotonic()
            self._say(self._line())

    def _speed(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-3)
        return f"{self._tokens / seconds:,.0f} tokens/s" if self._tokens else ""

    def _line(self) -> str:
        of = f" of {self._total / 1e6:,.1f}" if self._total else ""
        tokens = f", {self._tokens:,} tokens, {self._speed()}" if self._tokens else ""
        return f"{self._label}: {self._bytes / 1e6:,.1f}{of} MB{tokens}"
