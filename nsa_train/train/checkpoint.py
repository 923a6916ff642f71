"""Checkpoints that can be trusted: written aside, digested, named last; read only when every byte is as written.

    checkpoints/step_50/          complete: the directory was renamed to this after its manifest was on disk
        manifest.json             step, tokens, model identity, layout, size and sha256 of every other file
        optimizer_00000.safetensors   rank 0's pieces of fp32 weights and Adam moments, and its random states
        buffers.safetensors       router biases, the head's prior, draws of random blocks
    checkpoints/latest.json       pointer for people and scripts; resuming looks at the directories themselves
    checkpoints/step_50.tmp-*     being written, or torn by a kill: never read, removed by the next save
    checkpoints/step_50.corrupt   found damaged: named in the log, never read

Nothing is unpickled: safetensors and JSON only. Pieces of parameters are re-cut for any number of ranks and ZeRO stage.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import random
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nsa_train import runtime
from nsa_train.data.store import sha256_of
from nsa_train.errors import CheckpointError, StorageError
from nsa_train.parallel.engine import Engine, on_rank_zero

SCHEMA = "nsa-train/checkpoint/2"
COMPLETE = re.compile(r"step_(\d+)")
MANIFEST = "manifest.json"
BUFFERS = "buffers.safetensors"
SHARD = "optimizer_{:05d}.safetensors"
OWN = "rank"  # the only entry of a shard's metadata: safetensors writes several in any order, and files are compared


@dataclass(frozen=True)
class Found:
    """A verified checkpoint."""

    path: Path
    manifest: dict[str, Any]


def step_of(path: Path) -> int | None:
    """The step of a complete checkpoint's directory, None for any other name."""
    match = COMPLETE.fullmatch(path.name)
    return int(match.group(1)) if match and path.is_dir() else None


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    found = [(step, path) for path in folder.glob("step_*") if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


# Writing --------------------------------------------------------------------------------------------------------------


def save(folder: Path, step: int, engine: Engine, identity: str, state: dict[str, Any], keep: int) -> None:
    """Write `step_<step>` with all ranks together; raises StorageError on every rank, the older ones stay whole."""
    aside = folder / on_rank_zero(lambda: _make_aside(folder, step))
    files, problem = [], None
    try:
        files = _write_own_files(aside, engine)
    except (OSError, SafetensorError) as error:
        problem = _storage_problem(error, aside)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (files, problem))
    on_rank_zero(lambda: _complete(folder, aside, step, gathered, engine, identity, state))
    if runtime.rank() == 0:
        _retain(folder, keep)


def _make_aside(folder: Path, step: int) -> str:
    """Remove what kills left behind, check the space, and make the directory to write into."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for torn in folder.glob("step_*.tmp-*"):
            shutil.rmtree(torn)
        if older := complete(folder):
            _make_room(folder, older)
        aside = folder / f"step_{step}.tmp-{secrets.token_hex(4)}"
        aside.mkdir()
    except OSError as error:
        raise StorageError(_storage_problem(error, folder)) from error
    return aside.name


def _make_room(folder: Path, older: list[Path]) -> None:
    """StorageError unless another checkpoint fits; deletes all but the newest, if that helps and it is whole."""
    sizes = [sum(file.stat().st_size for file in path.iterdir()) for path in older]
    need, free = int(1.2 * sizes[0]), shutil.disk_usage(folder).free
    if free < need <= free + sum(sizes[1:]):
        with contextlib.suppress(CheckpointError):
            verify(older[0])
            _retain(folder, keep=1)
            free = shutil.disk_usage(folder).free
    if free < need:
        raise StorageError(
            f"{folder}: {free} bytes are free and a checkpoint needs about {need}; free some space and run again: "
            f"checkpoints stay as they are, the newest is {older[0].name}"
        )


def _write_own_files(aside: Path, engine: Engine) -> list[tuple[str, int, str]]:
    """This rank's files: (name, bytes, sha256)."""
    shard = {name: tensor.cpu() for name, tensor in engine.shard().items()}
    shard["rng.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        shard["rng.cuda"] = torch.cuda.get_rng_state()
    starts = {piece.name: piece.start for piece in engine.pieces()}
    own = [(SHARD.format(runtime.rank()), shard, {OWN: json.dumps({"rng": _python_random_state(), "starts": starts})})]
    if runtime.rank() == 0:
        own.append((BUFFERS, {name: b.cpu() for name, b in engine.module.named_buffers()}, {}))
    written = []
    for name, tensors, metadata in own:
        save_file(tensors, aside / name, metadata=metadata)
        runtime.readable_as_its_folder(aside / name)
        _sync(aside / name)
        written.append((name, (aside / name).stat().st_size, sha256_of(aside / name)))
        runtime.fault_point("checkpoint-shard")
    return written


def _complete(
    folder: Path, aside: Path, step: int, gathered: list[Any], engine: Engine, identity: str, state: dict[str, Any]
) -> None:
    problems = [problem for _, problem in gathered if problem]
    if problems:
        shutil.rmtree(aside, ignore_errors=True)
        raise StorageError(problems[0])
    manifest = {
        "schema": SCHEMA, "step": step, "identity": identity, "world_size": len(gathered),
        "steps_taken": engine.steps_taken(), "shapes": engine.shapes,
        "files": {name: {"bytes": size, "sha256": sha} for files, _ in gathered for name, size, sha in files},
        "state": state,
    }  # fmt: skip
    try:
        runtime.fault_point("checkpoint-before-manifest")
        _write_json(aside / MANIFEST, {**manifest, "digest": _digest_of(manifest)})
        runtime.fault_point("checkpoint-before-rename")
        final = folder / f"step_{step}"
        os.rename(aside, final)
        _sync(folder)
        runtime.fault_point("checkpoint-before-pointer")
        _write_json(folder / "latest.json.tmp", {"step": step, "path": final.name})
        os.replace(folder / "latest.json.tmp", folder / "latest.json")
        _sync(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise StorageError(_storage_problem(error, folder)) from error


def _retain(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep`; the one just written is among them."""
    for path in complete(folder)[max(1, keep) :]:
        _discard(path)


def _discard(path: Path) -> None:
    doomed = path.with_name(path.name + ".tmp-deleted")  # first it stops being a checkpoint, then its files go
    os.rename(path, doomed)
    runtime.fault_point("checkpoint-retention")
    shutil.rmtree(doomed)


def _storage_problem(error: Exception, place: Path) -> str:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "space" in str(error).lower()
    advice = "free some space" if full else "check the folder and its permissions"
    return f"{place}: cannot write a checkpoint ({error}); {advice} and run again: older checkpoints are whole"


def _python_random_state() -> dict[str, Any]:
    state: Any = numpy.random.get_state()
    return {"python": random.getstate(), "numpy": [state[0], state[1].tolist(), *state[2:]]}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1))
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


class OtherVersion(CheckpointError):
    """Of a checkpoint that is whole, and not of today's SCHEMA."""


# Reading --------------------------------------------------------------------------------------------------------------


def find_newest_good(folder: Path, identity: str) -> Found | None:
    """The newest checkpoint whose every file has the size and digest of its manifest; None where there is none yet.

    A damaged one is named, renamed to `.corrupt` and passed over. CheckpointError if all are damaged, now or in an
    earlier launch, or if the newest good one belongs to another model or another version, StorageError if one cannot be
    read now: it may be whole.
    """
    for path in complete(folder):
        try:
            manifest = verify(path)
        except OtherVersion:
            raise
        except CheckpointError as error:
            runtime.log.warning("damaged checkpoint, trying an older one: %s", error)
            os.rename(path, _free_name(path))
            continue
        if manifest["identity"] != identity:
            raise CheckpointError(
                f"{path} belongs to another model, or to one that an older version described (its identity is "
                f"{manifest['identity'][:12]}, this run's {identity[:12]}); move it away or choose another name="
            )
        return Found(path, manifest)
    if damaged := sorted(path.name for path in folder.glob("step_*.corrupt*")):
        raise CheckpointError(
            f"{folder}: no checkpoint is whole, {', '.join(damaged)} were found damaged; restore one from a backup, "
            "or delete the run folder to start again"
        )
    return None


NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)  # other OSErrors may be over in a moment


def verify(path: Path) -> dict[str, Any]:
    """The manifest, after every file was compared with it; CheckpointError names the file that differs."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"]
        if manifest.pop("digest") != _digest_of(manifest):
            raise CheckpointError(f"{path / MANIFEST} does not have the digest it names")
        if manifest["schema"] != SCHEMA:
            raise OtherVersion(
                f"{path} is of schema {manifest['schema']}, not {SCHEMA}: another version of nsa_train wrote it; use "
                "that one, or choose another name="
            )
        if not isinstance(files, dict):
            raise CheckpointError(f"{path / MANIFEST} names no files")
        needed = {BUFFERS, *(SHARD.format(rank) for rank in range(manifest["world_size"]))}
        if missing := sorted(needed - files.keys()):
            raise CheckpointError(f"{path / MANIFEST} does not vouch for {missing[0]}")
        for name, known in files.items():
            if Path(name).name != name:
                raise CheckpointError(f"{path / MANIFEST} names {name!r}, which is no plain file name")
            if not (path / name).is_file():
                raise CheckpointError(f"{path / name} is missing")
            size = (path / name).stat().st_size
            if size != known["bytes"]:
                raise CheckpointError(f"{path / name} has {size} bytes instead of {known['bytes']}")
            if sha256_of(path / name) != known["sha256"]:
                raise CheckpointError(f"{path / name} does not have the sha256 of its manifest")
    except (*NO_FILE, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    except OSError as error:
        place = error.filename or path
        raise StorageError(f"{place}: cannot be read now ({error.strerror}); nothing was changed") from error
    return manifest


def restore(found: Found, engine: Engine) -> None:
    """Fill engine, buffers and random states on every rank; number of ranks and ZeRO stage may differ from before."""
    with Weights(found) as weights:
        engine.load_shard(
            lambda part, piece: weights.read(part, piece.name, piece.start, piece.stop), found.manifest["steps_taken"]
        )
    with safe_open(found.path / BUFFERS, framework="pt") as file:
        for name, buffer in engine.module.named_buffers():
            buffer.copy_(file.get_tensor(name))
    if runtime.rank() < found.manifest["world_size"]:
        _restore_random(found.path / SHARD.format(runtime.rank()))


class Weights:
    """The pieces that all ranks wrote of each flattened parameter, to be read in any other cut."""

    def __init__(self, found: Found) -> None:
        self._path, self._open = found.path, contextlib.ExitStack()
        self._pieces: dict[str, list[tuple[int, Any]]] = {}
        self.shapes: dict[str, list[int]] = found.manifest["shapes"]
        for rank in range(found.manifest["world_size"]):
            file = self._open.enter_context(safe_open(found.path / SHARD.format(rank), framework="pt"))
            for name, start in json.loads(file.metadata()[OWN])["starts"].items():
                self._pieces.setdefault(name, []).append((start, file))

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def whole(self, name: str) -> Tensor:
        """A parameter as it was trained; fp32."""
        return self.read("master", name, 0, math.prod(self.shapes[name])).view(self.shapes[name])

    def read(self, part: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a parameter's `part`, from whichever files hold them; fp32."""
        out, found = torch.empty(stop - start), 0
        for at, file in self._pieces.get(name, ()):
            piece = file.get_slice(f"{part}/{name}")
            a, b = max(start, at), min(stop, at + piece.get_shape()[0])
            if a < b:
                out[a - start : b - start] = piece[a - at : b - at]
                found += b - a
        if found != stop - start:
            raise CheckpointError(f"{self._path} holds {found} of the elements {start} to {stop} of {part}/{name}")
        return out


def _restore_random(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        states = json.loads(file.metadata()[OWN])["rng"]
        torch.set_rng_state(file.get_tensor("rng.torch"))
        if "rng.cuda" in file.keys() and torch.cuda.is_available():  # noqa: SIM118
            torch.cuda.set_rng_state(file.get_tensor("rng.cuda"))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.corrupt{n or ''}") for n in range(1000))
    return next(name for name in names if not name.exists())


def identity_of(model: torch.nn.Module, sections: dict[str, Any]) -> str:
    """What makes two checkpoints interchangeable: the model's sections of the configuration and its parameters."""
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    return hashlib.sha256(json.dumps([sections, shapes], sort_keys=True).encode()).hexdigest()
