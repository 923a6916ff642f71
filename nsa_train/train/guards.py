"""What may end a run early: signals, agreed on by all ranks at a step's end, and steps that stay non-finite."""

from __future__ import annotations

import signal
import time
from types import FrameType

from nsa_train.errors import DivergedError

SAME_CTRL_C_S = 2.0


class StopSignals:
    """SIGTERM, SIGINT and SIGUSR1 only raise a flag; the loop finishes its step. A second Ctrl-C stops at once.

    So does the first of any, until the loop says that it is `training`: before, there is nothing to save.

    Second means seconds later: a terminal sends one Ctrl-C to torchrun and to us, and torchrun passes its own on.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.training = False
        self._first_s = 0.0

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.training:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self._first_s = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._first_s > SAME_CTRL_C_S:
            raise KeyboardInterrupt


class BadSteps:
    """Counts steps in a row whose loss or gradient was not finite; every rank sees the same ones."""

    def __init__(self, limit: int) -> None:
        self.limit, self.in_a_row = limit, 0

    def note(self, step: int, bad: bool) -> None:
        """Raises DivergedError once `limit` steps in a row were bad."""
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if self.in_a_row >= self.limit:
            raise DivergedError(
                f"loss or gradient was not finite in {self.in_a_row} steps in a row, up to step {step}; lower optim.lr "
                "or look at the data of these steps, then run again from the last checkpoint under another name="
            )
