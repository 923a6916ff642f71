"""How rows of eval/<task>.json add up: those of `nsa-train eval` at several times, and those that a kept run has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


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
