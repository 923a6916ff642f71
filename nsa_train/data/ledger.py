"""What did not become a document, and why: an input that cannot be read stops everything or is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal, TypeVar

from nsa_train.errors import DataError

SHOWN = 20  # messages that are kept
Item = TypeVar("Item")


class Ledger:
    """Counts what a pass over the input left out. `broken` are the first messages about unreadable input."""

    def __init__(self, on_error: Literal["stop", "skip"]) -> None:
        self._on_error = on_error
        self.left_out: Counter[str] = Counter()
        self.broken: list[str] = []

    def leave_out(self, reason: str) -> None:
        """Count a document or file that is fine but not wanted."""
        self.left_out[reason] += 1

    def refuse(self, message: str, cause: BaseException | None = None) -> None:
        """Raise DataError, or count the record or file as broken and let the caller go on behind it."""
        if self._on_error == "stop":
            raise DataError(message) from cause
        self.left_out["broken"] += 1
        if len(self.broken) < SHOWN:
            self.broken.append(message)

    def guard(self, items: Iterator[Item], name: str) -> Iterator[Item]:
        """`items` of the file `name` up to where it cannot be read; in what it raises, say what else can be done."""
        try:
            yield from items
        except OSError as error:
            self.refuse(f"{name}: cannot be read ({error.strerror or error})", error)
        except DataError as error:
            if self._on_error == "stop":
                raise DataError(f"{error}; data.on_error=skip leaves it out") from error
            self.refuse(str(error), error)
