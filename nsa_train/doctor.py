"""What this machine has, and what will be slow or fail on it: one line each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from nsa_train import runtime
from nsa_train.config.schema import Config

MIN_FREE_GIB = 5


def examine(config: Config) -> int:
    """Print the lines of `nsa-train doctor`; 0 unless something that training needs is missing."""
    failed = False
    for verdict, line in (*_software(), *_devices(), *_storage(config), *_services(config)):
        failed |= verdict == "FAIL"
        runtime.log.info("%-5s %s", verdict, line)
    return 2 if failed else 0


def _software() -> Iterator[tuple[str, str]]:
    for package, version in runtime.versions().items():
        needed = package != "wandb"
        yield ("ok" if version != "missing" else "FAIL" if needed else "warn"), f"{package} {version}"
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    yield ("ok", f"C compiler {compiler}") if compiler else ("warn", "no C compiler: Triton kernels cannot be built")


def _devices() -> Iterator[tuple[str, str]]:
    import torch
    import torch.nn.functional as F

    cores = len(os.sched_getaffinity(0))
    yield "ok", f"{cores} CPU cores, {torch.get_num_threads()} threads for torch"
    if not torch.cuda.is_available():
        yield "warn", "no CUDA device: training runs on the CPU in fp32, which suits the tiny preset only"
        return
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        line = f"GPU {i}: {facts.name}, {facts.total_memory / 2**30:.0f} GiB, sm_{facts.major}{facts.minor}"
        yield ("ok", line) if facts.major >= 8 else ("FAIL", f"{line}: bf16 needs sm_80 or newer")
    if not hasattr(F, "grouped_mm"):
        yield "FAIL", "torch has no grouped_mm: experts cannot run on a GPU; use torch 2.11 or newer"


def _storage(config: Config) -> Iterator[tuple[str, str]]:
    for name, folder in (("runs_dir", config.runs_dir), ("data.prepared_dir", config.data.prepared_dir)):
        place = Path(folder).resolve()
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free / 2**30
        if not place.is_dir() or not os.access(place, os.W_OK):
            yield "FAIL", f"{name}: {place} is not a folder that can be written to"
        else:
            yield ("ok" if free >= MIN_FREE_GIB else "warn"), f"{name}: {free:.0f} GiB free at {place}"


def _services(config: Config) -> Iterator[tuple[str, str]]:
    mode = runtime.wandb_mode(config.logging.wandb)
    why = {"offline": ": no key found, runs stay local (`wandb login` and `wandb sync` bring them online)"}
    yield "ok", f"W&B {mode}{why.get(mode, '')}"
