"""How rows of eval/<task>.json add up: those of `nsa-train eval` at several times, and those that a kept run has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nsa_train.errors import RunFolderError

Row = dict[str, Any]
NAMED = {"what": str, "task": str, "length": int}  # in every row


def read_answers(path: Path) -> list[Row]:
    """Rows of a task's file. Raises RunFolderError."""
    try:
        return rows_in(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: no answer of `nsa-train eval` ({error}); delete it to ask again") from error


def rows_in(found: Any, key: str = "rows") -> list[Row]:
    """Answers that stand there in plain data. Raises ValueError where other things do."""
    rows = found.get(key) if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(map(_is_answer, rows)):
        raise ValueError(f"{key} must be a list of objects, each with {', '.join(NAMED)}")
    return rows


def _is_answer(row: Any) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in NAMED.items())


def settings_of(rows: Sequence[Row]) -> dict[str, Row]:
    """How each task was asked: what rows of any length have in common. Rows of before they were kept say nothing."""
    return {row["task"]: row["settings"] for row in rows if "settings" in row}


def added(earlier: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """`rows` behind the earlier ones that they leave: of other tasks, and of other lengths where they were asked alike.

    Earlier rows of a task that was asked in another way do not stand beside new ones: all of them go.
    """
    before, now = settings_of(earlier), settings_of(rows)
    tasks, places = {row.get("task") for row in rows}, {(row.get("task"), row.get("length")) for row in rows}

    def stays(row: Row) -> bool:
        task = row.get("task")
        return task not in tasks or (
            before.get(task) == now.get(task) and (task, row.get("length")) not in places  # type: ignore[arg-type]
        )

    return [*filter(stays, earlier), *rows]
