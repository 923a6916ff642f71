"""Speeds that `nsa-train bench training` measured of arms alone, for runs that shared their device with others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_train.bench.training import settings_of
from nsa_train.compare import kept
from nsa_train.compare.rates import OF_SWEEPS
from nsa_train.compare.runs import Run
from nsa_train.config.load import load_config
from nsa_train.errors import ConfigError, NsaTrainError
from nsa_train.train.folder import differing

# Of what changes no result, and a sweep may thus differ in, what decides how fast a run is.
DECIDE_SPEED = (
    "trainer.micro_rows", "trainer.activation_checkpointing", "trainer.recomputed", "parallel.zero_stage",
    "parallel.offload_optimizer", "parallel.offload_params",
)  # fmt: skip
FREE = (*(key for key in OF_SWEEPS if key not in DECIDE_SPEED), "init_from")


@dataclass(frozen=True)
class Speeds:
    """Rows of a training benchmark that have a speed, and the device that they are of."""

    path: Path
    device: str
    rows: list[dict[str, Any]]

    @staticmethod
    def read(path: Path) -> Speeds:
        """Raises NsaTrainError where there are none."""
        try:
            found = json.loads(path.read_text())
            if found["schema"] != "nsa-train/training/1":
                raise ValueError(f"its schema is {found['schema']}")
            return Speeds(path, found["device"]["name"], [row for row in found["rows"] if "error" not in row])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise NsaTrainError(f"--speeds {path}: no result of `nsa-train bench training` ({error!r})") from error

    def of(self, run: Run) -> float | None:
        """Tokens per second of the run's recipe alone on such devices, the fastest measured; None where none was."""
        if run.manifest["device"] != self.device:
            return None
        return max((row["tokens_per_s"] for row in self.rows if self._alike(row, run)), default=None)

    def _alike(self, row: dict[str, Any], run: Run) -> bool:
        ours = (run.config.experiment, run.config.arm, run.manifest["world_size"])
        if (row["preset"], row["attention"], row["gpus"]) != ours:
            return False
        try:
            there = load_config(settings_of(row))
        except ConfigError:  # of an older version
            return False
        return not differing(kept.recipe(there), kept.recipe(run.config), FREE)
