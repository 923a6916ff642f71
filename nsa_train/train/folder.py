"""The run folder: claimed by one job, bound to one configuration, and what stands in it beside checkpoints.

runs/<name>/  config.yaml  manifest.json  deepspeed.json  metrics.jsonl  summary.json  heldout.npz  checkpoints/
              export/
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import yaml

from nsa_train import runtime
from nsa_train.config import schema
from nsa_train.config.load import config_from_tree, load_config, to_tree, to_yaml
from nsa_train.errors import ConfigError, RunFolderError, StorageError
from nsa_train.train.failures import FIRST_FAILURE

# A resumed run may differ in these: they change how and how often, not what is computed, and of a corpus where it lies,
# for a checkpoint knows its hash.
FREE_KEYS = (
    "runs_dir", "logging", "profile", "data.root", "data.prepared_dir", "data.corpus", "data.workers",
    "parallel.zero_stage", "parallel.offload_optimizer", "parallel.offload_params", "parallel.timeout_s",
    "parallel.hang_s", "parallel.deepspeed",
    "trainer.checkpoint_every", "trainer.keep_checkpoints", "trainer.log_every", "trainer.export",
    "trainer.cuda_graphs", "trainer.activation_checkpointing", "trainer.recomputed",
)  # fmt: skip
# What was computed before a key of today came, where its default now is another.
BEFORE = {"model": {"embedding_std": 0.02, "head_prior": False}}


class RunFolder:
    """`runs/<name>`, held by a kernel lock that a killed job frees."""

    def __init__(self, config: schema.Config) -> None:
        self.path = config.run_dir
        self.config = config
        self._lock: IO[str] | None = None

    def claim(self) -> None:
        """Make and lock the folder; refuse another job's folder and another configuration's."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a+")
        except OSError as error:
            raise StorageError(f"{self.path}: cannot write the run folder ({error}); set runs_dir or name") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            raise RunFolderError(
                f"{self.path} is in use by another job ({lock.read().strip() or 'unknown'}); wait for it, or choose "
                "another name="
            ) from error
        lock.seek(0)
        lock.truncate()
        lock.write(f"process {os.getpid()} on {os.uname().nodename}")
        lock.flush()
        self._lock = lock
        (self.path / FIRST_FAILURE).unlink(missing_ok=True)
        self._check_config()

    def bind(self) -> None:
        """From here on the folder belongs to this configuration; a run that never starts binds nothing."""
        self.write("config.yaml", to_yaml(self.config))

    def release(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None

    def _check_config(self) -> None:
        path = self.path / "config.yaml"
        if not path.exists():
            return
        try:
            before = read_config(self.path)
        except RunFolderError as error:
            raise RunFolderError(f"{error}, or choose another name=") from error
        changed = [
            f"  {key}: {there!r} there, {now!r} now"
            for key, (there, now) in differing(to_tree(before), to_tree(self.config), FREE_KEYS).items()
        ]
        if changed:
            raise RunFolderError(
                f"{self.path} holds a run with another configuration; choose another name=, or delete the folder:\n"
                + "\n".join(changed)
            )

    def read_json(self, name: str) -> dict[str, Any]:
        """What a file of the folder holds; nothing where it is missing or damaged."""
        try:
            found = json.loads((self.path / name).read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, name: str, content: str | dict[str, Any]) -> None:
        """Replace a file as a whole, so that a kill leaves the old or the new one."""
        text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
        try:
            runtime.write_whole(self.path / name, text.encode())
        except OSError as error:
            raise StorageError(f"{self.path / name}: cannot be written ({error}); free some space") from error


def read_config(folder: Path) -> schema.Config:
    """The configuration of a run. Raises as `complete_config`."""
    path = folder / "config.yaml"
    try:
        return complete_config(yaml.safe_load(path.read_text()), path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunFolderError(f"{path}: cannot be read ({error}); name the folder of a run") from error


def complete_config(tree: Any, path: Path) -> schema.Config:
    """A configuration from `path`, of an older version too: keys that came later have the value that stands in BEFORE,
    or else that of its recipe today.

    Raises RunFolderError where there is none, ConfigError where it is no legal one.
    """
    try:
        recipe = [f"experiment={tree['experiment']}", f"attention={tree['arm']}"]
    except (TypeError, KeyError) as error:
        raise RunFolderError(f"{path}: cannot be read ({error}); name the folder of a run") from error
    try:
        for name, today in to_tree(load_config(recipe)).items():
            before = tree.get(name, today)
            both = isinstance(today, dict) and isinstance(before, dict)
            tree[name] = today | BEFORE.get(name, {}) | before if both else before
        return config_from_tree(tree)
    except ConfigError as error:
        raise ConfigError(
            f"{path}: {error}\nif another version of nsa_train wrote it, use that one, or train again with this one"
        ) from error


def differing(one: Any, other: Any, free: Sequence[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Keys of two configurations, as plain data, that differ, and both values; without `free` keys and sections."""
    a, b = _flat(one), _flat(other)
    return {
        key: (a.get(key), b.get(key))
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and not any(key == name or key.startswith(name + ".") for name in free)
    }


def _flat(tree: Any, place: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {place: tree}
    flat = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{place}.{key}" if place else str(key)))
    return flat
