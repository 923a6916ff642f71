"""What may end a run early: signals, agreed on by all ranks at a step's end, and steps that go wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from nsa_train import runtime
from nsa_train.config import schema
from nsa_train.errors import DivergedError

SAME_CTRL_C_S = 2.0
STOPPING = "this step or validation is finished, then a checkpoint written; Ctrl-C once more stops at once"


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
            if runtime.rank() == 0:  # not by logging, whose lock the interrupted code may hold
                with contextlib.suppress(OSError):  # nobody reads any more, and the run is to end as asked all the same
                    os.write(2, f"{self.received}: {STOPPING}\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self._first_s > SAME_CTRL_C_S:
            raise KeyboardInterrupt


class Spikes:
    """Tells losses that lie far above those of the last steps that were taken; of equal losses on all ranks.

    The losses stay on the device, so that asking costs no synchronisation. A skipped one never enters the window.
    """

    def __init__(self, trainer: schema.TrainerConfig, device: torch.device) -> None:
        self._sigmas = trainer.spike_sigmas
        self._recent = torch.zeros(trainer.spike_window, dtype=torch.float64, device=device)
        self._taken = 0

    def note(self, loss: Tensor) -> None:
        """The loss of a step that was taken."""
        self._recent[self._taken % len(self._recent)] = loss
        self._taken += 1

    def is_spike(self, loss: Tensor) -> Tensor:
        """True beyond `spike_sigmas` standard deviations above the mean; never before the window is full."""
        if self._taken < len(self._recent) or not self._sigmas:
            return torch.zeros_like(loss, dtype=torch.bool)
        return loss > self._recent.mean() + self._sigmas * self._recent.std()

    def forget(self) -> None:
        """Another stage begins, with losses of its own."""
        self._taken = 0

    def state(self) -> dict[str, Any]:
        return {"taken": self._taken, "recent": self._recent.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        self._taken = state["taken"]
        self._recent.copy_(torch.tensor(state["recent"], dtype=torch.float64))


class BadSteps:
    """Counts steps in a row that were skipped; every rank sees the same ones."""

    def __init__(self, limit: int) -> None:
        self.limit, self.in_a_row = limit, 0

    def note(self, step: int, bad: bool) -> None:
        """Raises DivergedError once `limit` steps in a row were bad."""
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if self.in_a_row >= self.limit:
            raise DivergedError(
                f"loss or gradient was not finite, or jumped, in {self.in_a_row} steps in a row, up to step {step}; "
                f"lower optim.lr or look at the rows (nsa-train data inspect step={step}), then start another name= "
                "with init_from= this run"
            )
