"""Speeds that `nsa-train bench training` measured of arms alone, for runs that shared their device with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nsa_train.bench import results
from nsa_train.bench.training import settings_of
from nsa_train.compare import kept
from nsa_train.compare.runs import Run
from nsa_train.config.load import load_config
from nsa_train.config.schema import Config
from nsa_train.data.stages import micro_batches_of, stages_of
from nsa_train.errors import ConfigError, NsaTrainError
from nsa_train.train.folder import differing

# What a short run and a long one may differ in without being faster or slower; micro-batches are compared as they are
# formed, and of a recording in CUDA graphs the report says whether there was one.
FREE = (
    "name", "seed", "runs_dir", "init_from", "logging", "profile", "data.root", "data.prepared_dir", "data.corpus",
    "optim.lr", "schedule", "trainer.steps", "trainer.micro_rows", "trainer.cuda_graphs", "trainer.log_every",
    "trainer.val_every", "trainer.val_rows", "trainer.heldout_rows", "trainer.checkpoint_every",
    "trainer.keep_checkpoints", "trainer.export", "parallel.timeout_s", "parallel.hang_s",
)  # fmt: skip

ODD = (KeyError, TypeError, ValueError, AttributeError, ConfigError)  # what a row raises that tells no speed


class Speed(NamedTuple):
    """What a row of the benchmark says: the run behind it, tokens per second, and whether CUDA graphs were replayed."""

    config: Config
    gpus: int
    tokens_per_s: float
    cuda_graphs: bool

    @staticmethod
    def of_row(row: dict[str, Any]) -> Speed:
        """Raises one of ODD where the row failed, was written before a key of today, or is no such row."""
        return Speed(load_config(settings_of(row)), row["gpus"], float(row["tokens_per_s"]), row["cuda_graphs"])


@dataclass(frozen=True)
class Speeds:
    """What a file of the benchmark found on one kind of device."""

    path: Path
    device: str | None
    found: tuple[Speed, ...]

    @staticmethod
    def read(path: Path, runs: Sequence[Run]) -> Speeds:
        """Raises NsaTrainError where the file has no speed of any run that shared its device.

        Rows that tell no speed are left out.
        """
        result = results.read_result(path, "training", "--speeds", "`nsa-train bench training`")
        found = []
        for row in result["rows"]:
            try:
                found.append(Speed.of_row(row))
            except ODD:
                continue
        device = result.get("device")
        speeds = Speeds(path, device.get("name") if isinstance(device, dict) else None, tuple(found))
        if not any(map(speeds.of, runs)):
            raise NsaTrainError(
                f"--speeds {path}: has the speed of none of these runs that shared a device: no row of their "
                "experiment, arm, device, GPUs and settings; run `nsa-train bench training` with their settings"
            )
        return speeds

    def of(self, run: Run) -> Speed | None:
        """Of the run's recipe, alone on such devices, the fastest; None where the run was alone itself.

        None, too, where it went through stages, whose rows differ.
        """
        if run.runs_a_device == 1 or run.manifest["device"] != self.device or len(stages_of(run.config)) > 1:
            return None
        recipe, world = kept.recipe(run.config), run.manifest["world_size"]
        alike = [
            speed for speed in self.found
            if speed.gpus == world and _micro_batches(speed.config, world) == _micro_batches(run.config, world)
            and not differing(kept.recipe(speed.config), recipe, FREE)
        ]  # fmt: skip
        return max(alike, key=lambda speed: speed.tokens_per_s, default=None)


def _micro_batches(config: Config, world: int) -> int:
    return micro_batches_of(stages_of(config), config.trainer, world)
