"""The head that every file under docs/results/ carries: what was run, on what, with which versions."""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch

from nsa_train import runtime
from nsa_train.config.rules import SAFE_NAME
from nsa_train.errors import NsaTrainError

# The folders of an absolute path: of a word, a value, one of a list, or what quotes or a scheme stand before.
FOLDERS = re.compile(r"""(?<![^\s=,:'"\[({])/([^/,'"\])}]+/)*(?=[^\s/,'"\])}])""")
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


def safe_name(name: str) -> str:
    """The name itself, where files may carry it. Raises NsaTrainError."""
    if not SAFE_NAME.fullmatch(name):
        raise NsaTrainError(f"--name {name!r} may hold letters, digits and . _ - only, 100 at most")
    return name


def device_facts() -> dict[str, Any]:
    """name, count, sm and driver of the GPUs, or the CPU's model and its usable cores."""
    if not torch.cuda.is_available():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
        return {"name": name, "count": len(os.sched_getaffinity(0)), "sm": None, "driver": None}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    major, minor = torch.cuda.get_device_capability()
    return {
        "name": torch.cuda.get_device_name(), "count": torch.cuda.device_count(), "sm": f"{major}{minor}",
        "driver": driver[0] if driver else None,
    }  # fmt: skip


def gpu_label() -> str:
    """The GPU's name as files carry it: `NVIDIA H100 80GB HBM3` is h100."""
    found = re.search(r"[A-Z]+\d+[A-Z]*", torch.cuda.get_device_name())
    return found.group().lower() if found else "gpu"


def without_folders(word: str) -> str:
    """A word of a command, of its absolute paths the last part only, as files of kept runs do."""
    return FOLDERS.sub("", word)


def command_line() -> str:
    """What the user typed, `without_folders`."""
    ours = sys.argv[0].endswith(("__main__.py", "nsa-train"))
    program = ["nsa-train"] if ours else ["python", without_folders(sys.argv[0])]
    return shlex.join([*program, *map(without_folders, sys.argv[1:])])


def source(commit: str | None) -> dict[str, Any]:
    """command and commit of a measurement; `commit` names the source where the checkout does not."""
    return {"command": command_line(), "commit": commit or runtime.git_commit()}


def with_earlier(
    path: Path, rows: list[dict[str, Any]], key_of: Callable[[dict[str, Any]], Hashable]
) -> list[dict[str, Any]]:
    """`rows` behind those of an earlier file that have another key: one command measures a part of a table.

    Raises NsaTrainError where the file cannot be read.
    """
    new = {key_of(row) for row in rows}
    try:
        earlier = json.loads(path.read_text())["rows"] if path.exists() else []
        return [*(row for row in earlier if key_of(row) not in new), *rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NsaTrainError(f"{path}: no earlier results ({error!r}); delete or move it") from error


def read_result(path: Path, kind: str, option: str, maker: str) -> dict[str, Any]:
    """What `write_result` wrote there, its rows a list; `maker` is the command that does.

    Raises NsaTrainError, naming the option, where the file cannot be read or is of another kind.
    """
    try:
        found = json.loads(path.read_text())
        if found["schema"] != (wanted := f"nsa-train/{kind}/1"):
            raise ValueError(f"its schema is {found['schema']}, not {wanted}")
        return {**found, "rows": list(found["rows"])}
    except OSError as error:
        raise NsaTrainError(f"{option} {path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise NsaTrainError(f"{option} {path}: no result of {maker} ({error!r})") from error


def make_folder(folder: Path) -> None:
    """Raises NsaTrainError where `folder` is a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NsaTrainError(f"--out {folder}: there is a file of that name; choose another folder") from error


def write_result(
    name: str, kind: str, rows: list[dict[str, Any]], commit: str | None = None, folder: Path = RESULTS
) -> Path:
    """<folder>/<name>.json, a row a line; `commit` names the source where the checkout does not, as in a copy of it.

    Raises NsaTrainError where `folder` is a file.
    """
    path = folder / f"{name}.json"
    head = {
        "schema": f"nsa-train/{kind}/1",
        **source(commit),
        "date": datetime.date.today().isoformat(),
        "device": device_facts(),
        "versions": runtime.versions(),
    }
    lines = ",\n  ".join(json.dumps(row, separators=(",", ":")) for row in rows)
    text = json.dumps(head, indent=1).removesuffix("\n}") + f',\n "rows": [\n  {lines}\n ]\n}}\n'
    make_folder(folder)
    runtime.write_whole(path, text.encode())
    return path
