"""A finished run as one small file, <run>.json.xz: all that a comparison reads of its folder.

Its attention maps, an image, lie beside it as <run>-maps.png.

schema       nsa-train/run/1
config       of config.yaml; absolute paths are reduced to their last part
manifest     of manifest.json
summary      of summary.json
rows         of metrics.jsonl, figures rounded
heldout      arrays of heldout.npz as lists; of `position` and `recall` losses, rounded, and labels: [2, N, buckets]
evaluations  rows of eval/*.json, figures rounded

Rounded is to DIGITS significant digits, of a loss of 5 nats per token 0.000005. A file says neither when nor where it
was written: one run gives the same file again.
"""

from __future__ import annotations

import dataclasses
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nsa_train import runtime
from nsa_train.config import schema
from nsa_train.config.load import to_tree
from nsa_train.errors import RunFolderError, StorageError
from nsa_train.train.answers import added, rows_in
from nsa_train.train.folder import complete_config
from nsa_train.train.heldout import HeldOut

SCHEMA, SUFFIX = "nsa-train/run/1", ".json.xz"
FIGURE_BYTES = 200_000  # of a PNG beside results, at most
DIGITS = 6
PARTS = ("config", "manifest", "summary", "rows", "heldout", "evaluations")
ROUNDED = ("rows", "evaluations")
SUMS = ("position", "recall")  # of HeldOut: [N, buckets, 2]


def save(path: Path, parts: dict[str, Any]) -> bool:
    """Write PARTS of a run, which are those of `Run`; False: they are there already.

    Evaluations are added to those of a file that is there. Raises RunFolderError where that holds another run,
    StorageError where it cannot be written.
    """
    plain = {"schema": SCHEMA, **parts, "config": _without_places(to_tree(parts["config"]))}
    plain |= {"heldout": _lists(parts["heldout"]), **{key: _rounded(parts[key]) for key in ROUNDED}}
    now = json.loads(json.dumps(plain))
    if path.exists():
        config = load(path)["config"]  # complete: keys may have come since
        before = {**_read(path), "config": _without_places(to_tree(config))}
        now["evaluations"] = added(before["evaluations"], now["evaluations"])
        if before == now:
            return False
        if {**before, "evaluations": now["evaluations"]} != now:
            raise RunFolderError(f"{path}: keeps another run of that name; choose another folder, or delete the file")
    text = json.dumps(now, separators=(",", ":"))
    _write(path, lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    return True


def maps_of(path: Path) -> Path:
    """Where the attention maps of a kept run lie, if it has any."""
    return path.with_name(f"{path.name.removesuffix(SUFFIX)}-maps.png")


def save_maps(path: Path, figure: Path) -> bool:
    """Copy the attention maps of the run that `path` keeps; False: they are too large. Raises StorageError."""
    if figure.stat().st_size > FIGURE_BYTES:
        return False
    _write(maps_of(path), figure.read_bytes())
    return True


def _write(path: Path, content: bytes) -> None:
    """As a whole. Raises StorageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        runtime.write_whole(path, content)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error}); choose another folder") from error


def load(path: Path) -> dict[str, Any]:
    """PARTS of a run. Raises RunFolderError, or ConfigError where the configuration is no legal one."""
    found = _read(path)
    try:
        parts = {key: found[key] for key in PARTS}
        parts["evaluations"] = rows_in(found, "evaluations")
        return parts | {"config": complete_config(parts["config"], path), "heldout": _arrays(parts["heldout"])}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RunFolderError(f"{path}: something is missing ({error}); keep the run again") from error


# Besides FREE_KEYS, what runs of one recipe may differ in: rounding.
SAME_RESULT = ("trainer.micro_rows",)


def recipe(config: schema.Config) -> dict[str, Any]:
    """What of a configuration runs on any machine share: no absolute paths, nor where sources lie."""
    tree = _without_places(to_tree(config))
    tree["init_from"] = config.init_from and Path(config.init_from).name
    for source in tree["data"]["sources"].values():
        del source["root"]
    return tree


def _mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Plain data with every value that is no dictionary or list changed."""
    if isinstance(tree, dict):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_mapped(value, change) for value in tree]
    return change(tree)


def _without_places(tree: Any) -> Any:
    """Plain data with absolute paths reduced to their last part."""
    return _mapped(tree, lambda x: Path(x).name if isinstance(x, str) and x.startswith("/") else x)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(lzma.decompress(path.read_bytes()))
    except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read ({error}); name files of `nsa-train compare keep`") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise RunFolderError(f"{path}: holds no {SCHEMA}; name files of `nsa-train compare keep`")
    return found


def _rounded(tree: Any) -> Any:
    return _mapped(tree, lambda x: float(f"{x:.{DIGITS}g}") if isinstance(x, float) else x)


def _lists(heldout: HeldOut) -> dict[str, Any]:
    lists = {name: array.tolist() for name, array in dataclasses.asdict(heldout).items()}
    for name in SUMS:
        loss, labels = np.moveaxis(getattr(heldout, name), -1, 0)
        lists[name] = [_rounded(loss.tolist()), labels.astype(np.int64).tolist()]
    return lists


def _arrays(lists: dict[str, Any]) -> HeldOut:
    arrays = {name: np.array(values) for name, values in lists.items()}
    sums = {name: np.moveaxis(arrays[name], 0, -1).astype(np.float64) for name in SUMS}
    return HeldOut(**{**arrays, **sums, "source": arrays["source"].astype(np.int32)})
