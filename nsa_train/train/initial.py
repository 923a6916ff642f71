"""The weights that a run starts with: drawn, or taken from another run or an export, and the hashes that name them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nsa_train import runtime
from nsa_train.errors import CheckpointError, NsaTrainError
from nsa_train.model.transformer import Transformer
from nsa_train.parallel.materialise import materialise
from nsa_train.train import checkpoint

ARM_ONLY = (".kv.cmp.", ".kv.win.", ".phi_k.", ".phi_v.", ".attention.gate.")
EXPORT, EXPORT_INDEX, EXPORT_PREFIX = "model.safetensors", "model.safetensors.index.json", "transformer."
RUN_FACTS = ("rows_fingerprint", "rows_sample_sha256", "initial_weights_sha256", "origin")  # of a run's manifest
SHOWN = 8


class Source(NamedTuple):
    """Shapes of the tensors that can be taken, and how to read one."""

    shapes: dict[str, list[int]]
    read: Callable[[str], Tensor]


def locate(folder: Path) -> Path | checkpoint.Found:
    """What `init_from` names: the folder of an export, or a checkpoint, or of a run the newest whole checkpoint.

    Where a run has no checkpoint any more, it is its export. NsaTrainError where it is none of them, or where no
    checkpoint of the run is whole.
    """
    if _is_export(folder):
        return folder
    damaged = ""
    for path in [*checkpoint.complete(folder / "checkpoints"), *([folder] if checkpoint.step_of(folder) else [])]:
        try:
            return checkpoint.Found(path, checkpoint.verify(path))
        except CheckpointError as error:
            runtime.log.warning("damaged checkpoint, trying an older one: %s", error)
            damaged = f"; {path} is damaged"
    if _is_export(folder / "export"):
        if not damaged:
            return folder / "export"
        damaged += f", {folder / 'export'} is not"
    raise NsaTrainError(
        f"init_from={folder} is no run with a checkpoint, no checkpoint and no export{damaged}; name the folder of one"
    )


def _is_export(folder: Path) -> bool:
    return (folder / EXPORT).is_file() or (folder / EXPORT_INDEX).is_file()


def origin_of(place: Path | checkpoint.Found) -> dict[str, Any]:
    """Where weights come from: of a run, its step, the rows that it read, what it started with, and its own origin."""
    if isinstance(place, Path):
        return {"folder": str(place), **_run_of(place)}
    state = place.manifest["state"]
    return {
        "folder": str(place.path), "step": state["progress"]["step"],
        "rows_fingerprint": state["loader"]["fingerprint"],
        "rows_sample_sha256": state["loader"].get("sample_sha256"),
        "initial_weights_sha256": state["progress"]["initial_weights"], "origin": state["progress"].get("origin"),
    }  # fmt: skip


def _run_of(export: Path) -> dict[str, Any]:
    """What an export in the folder of a finished run knows of it; elsewhere it knows nothing."""
    try:
        summary = json.loads((export.parent / "summary.json").read_text())
        manifest = json.loads((export.parent / "manifest.json").read_text())
        facts = {key: manifest[key] for key in RUN_FACTS if key in manifest}  # older runs have not all of them
        return {"step": summary["steps"], **facts} if summary["status"] == "done" else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def start_weights(
    model: Transformer, seed: int, place: Path | checkpoint.Found | None, dtype: torch.dtype, settings: dict[str, Any]
) -> tuple[dict[str, str], list[str]]:
    """Give a model on the meta device its weights, drawn or from `place`, and put it on the device.

    Returns the sha256 of each parameter's fp32 values by name and shape, equal in all arms that have the parameter, and
    the lines of `take_weights`, whose errors it raises.
    """
    named = sorted((name, list(parameter.shape)) for name, parameter in model.named_parameters())
    make = model.initial_values(seed)
    model.draw_blocks(seed)
    lines: list[str] = []
    with contextlib.ExitStack() as files:
        if place:
            taken, lines = take_weights(model, place, files)
            make |= taken
        hashes = materialise(model, make, dtype, settings)
    return {f"{name} {shape}": hashes[name] for name, shape in named}, lines


def take_weights(
    model: Transformer, place: Path | checkpoint.Found, files: contextlib.ExitStack
) -> tuple[dict[str, Callable[[], Tensor]], list[str]]:
    """Copy buffers from `place`, and by parameter what reads its values (fp32) from there, while `files` is open.

    Buffers are router biases, the head's prior and draws of random blocks. Also lines that say what is taken and what
    not. NsaTrainError where a tensor has another shape there, where none is one of the model's, or where a file is
    damaged.
    """
    folder = place if isinstance(place, Path) else place.path
    wanted, buffers = {**dict(model.named_parameters()), **dict(model.named_buffers())}, dict(model.named_buffers())
    with _readable(folder):
        source = files.enter_context(_export(place) if isinstance(place, Path) else _checkpoint(place))
        found = sorted(wanted.keys() & source.shapes.keys())
        _check_shapes(folder, {name: (source.shapes[name], list(wanted[name].shape)) for name in found})
        for name in buffers.keys() & found:
            buffers[name].copy_(source.read(name))

    def read(name: str) -> Tensor:
        with _readable(folder):
            return source.read(name).float()

    lines = [f"starting from the weights of {folder}: {len(found)} of {len(wanted)} tensors"]
    if missing := wanted.keys() - source.shapes.keys():
        lines.append(f"not found there, they start afresh: {_in_short(missing)}")
    if unused := source.shapes.keys() - wanted.keys():
        lines.append(f"not of this model, left out: {_in_short(unused)}")
    return {name: partial(read, name) for name in found if name not in buffers}, lines


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise NsaTrainError(f"init_from: {folder} cannot be read ({type(error).__name__}: {error})") from error


def _check_shapes(folder: Path, shapes: dict[str, tuple[list[int], list[int]]]) -> None:
    if not shapes:
        raise NsaTrainError(f"init_from: {folder} holds another model: no tensor has the name of one of this model's")
    other = [f"  {name}: {there} there, {here} here" for name, (there, here) in shapes.items() if there != here]
    if other:
        more = f"\n  and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
        raise NsaTrainError(
            f"init_from: {folder} holds another model, set model, attention and moe as there:\n"
            + "\n".join(other[:SHOWN]) + more
        )  # fmt: skip


@contextlib.contextmanager
def _checkpoint(found: checkpoint.Found) -> Iterator[Source]:
    with checkpoint.Weights(found) as weights, safe_open(found.path / checkpoint.BUFFERS, framework="pt") as buffers:
        names = buffers.keys()
        shapes = weights.shapes | {name: buffers.get_slice(name).get_shape() for name in names}
        yield Source(shapes, lambda name: buffers.get_tensor(name) if name in names else weights.whole(name))


@contextlib.contextmanager
def _export(folder: Path) -> Iterator[Source]:
    names = {EXPORT}
    if (folder / EXPORT_INDEX).is_file():
        names = set(json.loads((folder / EXPORT_INDEX).read_text())["weight_map"].values())
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(folder / Path(name).name, framework="pt")) for name in sorted(names)]
        at = {key.removeprefix(EXPORT_PREFIX): (file, key) for file in files for key in file.keys()}  # noqa: SIM118
        shapes = {name: file.get_slice(key).get_shape() for name, (file, key) in at.items()}
        yield Source(shapes, lambda name: at[name][0].get_tensor(at[name][1]))


def _in_short(names: Iterable[str]) -> str:
    """Names with the layer left open, and how many they stand for."""
    counts = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in sorted(counts.items()))


def common_hash(weights: dict[str, str]) -> str:
    """sha256 over the initial values that `full` and `nsa` share; equal hashes make their comparison fair."""
    digest = hashlib.sha256()
    for name, one in weights.items():
        if not any(part in name for part in ARM_ONLY):
            digest.update(f"{name} {one}".encode())
    return digest.hexdigest()
