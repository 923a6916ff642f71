"""Learning rates that a sweep of scripts/compare_arms.py found, for the runs whose recipe it had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_train.bench import results
from nsa_train.compare import kept
from nsa_train.config.load import load_config
from nsa_train.config.schema import Config
from nsa_train.errors import ConfigError, NsaTrainError
from nsa_train.train.folder import FREE_KEYS, differing

# An ablation takes the rate of the arm that it ablates, unless it has a sweep of its own.
ABLATES = {
    "nsa_random": "nsa", "nsa_no_slc": "nsa", "nsa_no_win": "nsa", "nsa_shared_kv": "nsa", "window": "nsa",
    "full_gated_wide": "full_gated",
}  # fmt: skip
# In which a sweep may differ from the runs that take its rates: how long and how it is measured, beside where it lies.
OF_SWEEPS = (
    *FREE_KEYS, *kept.SAME_RESULT, "name", "seed", "optim.lr", "trainer.steps", "schedule", "trainer.val_every",
    "trainer.val_rows", "trainer.heldout_rows",
)  # fmt: skip
STEP = 2.0  # from one rate to the next, where a sweep had one rate only


@dataclass(frozen=True)
class Rates:
    """The rows of a sweep by arm: lr, the best rate; losses, by rate; at_edge; set, the words of --set."""

    path: Path
    rows: dict[str, dict[str, Any]]

    @staticmethod
    def read(path: Path) -> Rates:
        """Raises NsaTrainError where there is none."""
        try:
            rows = results.read_result(path, "sweep", "--rates", "a sweep of scripts/compare_arms.py")["rows"]
            return Rates(path, {row["arm"]: {**row, "lr": float(row["lr"]), "losses": _losses(row)} for row in rows})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise NsaTrainError(
                f"--rates {path}: rows without arm, rate and losses ({error!r}); sweep again"
            ) from error

    def swept(self, arm: str) -> str:
        """The arm whose rate this one takes: itself where it was swept, or the one that it ablates."""
        return arm if arm in self.rows else ABLATES.get(arm, arm)

    def of(self, arms: Sequence[str], overrides: Sequence[str]) -> dict[str, float]:
        """Each arm's rate, for runs of which --set says `overrides`.

        Raises NsaTrainError where the sweep knows no rate of an arm, where a best one lies at the edge of those that
        were tried, and where the sweep had another recipe.
        """
        if missing := [arm for arm in arms if self.swept(arm) not in self.rows]:
            named = ", ".join(missing)
            raise NsaTrainError(f"--rates {self.path}: no learning rate for {named}; sweep these arms too")
        swept = list(dict.fromkeys(map(self.swept, arms)))
        if lines := [line for arm in swept for line in (*self._edge(arm), *self._other_recipe(arm, overrides))]:
            raise NsaTrainError(f"--rates {self.path} has no rates for these runs:\n" + "\n".join(lines))
        return {arm: self.rows[self.swept(arm)]["lr"] for arm in arms}

    def rows_of(self, configs: Sequence[Config]) -> list[dict[str, Any]]:
        """What the sweep found for the arm of each run, as rows of a report.

        Raises NsaTrainError where a run had another learning rate.
        """
        found = {}
        for config in configs:
            swept = self.swept(config.arm)
            row = self.rows.get(swept, {"lr": None})
            if row["lr"] != config.optim.lr:
                raise NsaTrainError(
                    f"--rates {self.path}: {config.name} was trained at {config.optim.lr:g}, but the sweep's rate of "
                    f"{swept} is {row['lr'] or 'unknown'}; name the sweep of these runs"
                )
            found[config.arm] = {**row, "what": "sweep", "arm": config.arm, "swept": swept}
        return list(found.values())

    def _edge(self, arm: str) -> list[str]:
        """A best rate at the edge says nothing of what lies beyond, unless a rate beyond it diverged."""
        row = self.rows[arm]
        if not row.get("at_edge"):
            return []
        tried = sorted(map(float, row["losses"] or [row["lr"]]))
        step = tried[1] / tried[0] if len(tried) > 1 else STEP
        beyond = [row["lr"] / step] * (row["lr"] == tried[0]) + [row["lr"] * step] * (row["lr"] == tried[-1])
        words = " ".join(f"{lr:.4g}" for lr in sorted([*tried, *beyond]))
        return [f"  {arm}: the best rate {row['lr']:g} lies at the edge; go on with `sweep --arms {arm} --lrs {words}`"]

    def _other_recipe(self, arm: str, overrides: Sequence[str]) -> list[str]:
        if "set" not in self.rows[arm]:
            return [f"  {arm}: the sweep does not say what it set; sweep again"]
        word = f"attention={arm}"
        try:
            there = load_config([*self.rows[arm]["set"], word])
        except ConfigError as error:
            return [f"  {arm}: what the sweep set is no configuration of today; sweep again ({error})"]
        differ = differing(kept.recipe(there), kept.recipe(load_config([*overrides, word])), OF_SWEEPS)
        return [f"  {arm}: {key}={a!r} in the sweep, {b!r} now" for key, (a, b) in differ.items()]


def _losses(row: dict[str, Any]) -> dict[str, float | None]:
    """Of a sweep's row, by rate: None where it diverged. Raises where anything there is no number."""
    return {str(float(lr)): None if loss is None else float(loss) for lr, loss in row.get("losses", {}).items()}
