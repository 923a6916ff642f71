"""The process and its machine: rank, device, seeds, numeric type, console. The only reader of environment variables."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import nsa_train
from nsa_train.errors import ConfigError

if TYPE_CHECKING:
    import torch

log = logging.getLogger("nsa_train")
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells every process
RUNS_A_DEVICE = "NSA_TRAIN_RUNS_A_DEVICE"  # set by who starts several runs on one device at once
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM)


def storage_message(error: OSError) -> str:
    """What to do about one of STORAGE_ERRORS."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return f"{error.filename or 'disk'}: {error.strerror}; " + ("make room there" if full else "check its permissions")


def rank() -> int:
    return _told("RANK", "0")


def speaks() -> bool:
    """Whether errors are told by this process: rank 0, or one whose rank is no number."""
    return not os.environ.get("RANK", "0").isdecimal() or rank() == 0


def local_rank() -> int:
    return _told("LOCAL_RANK", "0")


def world_size() -> int:
    return _told("WORLD_SIZE", "1", least=1)


def _told(name: str, otherwise: str, least: int = 0) -> int:
    """A number of the environment. Raises ConfigError."""
    told = os.environ.get(name, otherwise)
    if not told.isdecimal() or int(told) < least:
        raise ConfigError(
            f"{name}={told} in the environment must be a number from {least} on; use torchrun, or unset it"
        )
    return int(told)


def runs_a_device() -> int:
    """How many runs share this one's device, itself included, as far as it was told. Raises ConfigError."""
    return _told(RUNS_A_DEVICE, "1", least=1)


def launch_alone() -> None:
    """Without a launcher (plain `python -m nsa_train train`) become a group of one process.

    Port 0 lets the system choose: a port that was free a moment ago may be another job's by now.
    """
    here = [name for name in LAUNCHER if name in os.environ]
    if "RANK" in here and len(here) < len(LAUNCHER):
        missing = ", ".join(name for name in LAUNCHER if name not in here)
        raise ConfigError(f"{', '.join(here)} in the environment without {missing}; use torchrun, or unset all of them")
    if rank() >= world_size():
        raise ConfigError(f"RANK={rank()} in the environment is none of WORLD_SIZE={world_size()} processes")
    if "RANK" not in here:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def share_cores(processes: int) -> None:
    """Give the processes that are started from here an equal number of threads, unless the environment names one."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))


def device() -> torch.device:
    """This rank's GPU, else the CPU (also where DeepSpeed was told to use the CPU)."""
    import torch

    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") != "cpu":
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def on_gpu() -> bool:
    return device().type == "cuda"


def dtype_of(name: str) -> torch.dtype:
    """`auto` is bf16 on a GPU and fp32 on a CPU."""
    import torch

    if name == "auto":
        return torch.bfloat16 if on_gpu() else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def seed_of(*keys: object) -> int:
    """A 63-bit seed that depends on every key and on nothing else."""
    digest = hashlib.sha256("|".join(str(key) for key in keys).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_everything(seed: int) -> None:
    """Seed the global generators of this rank (Python, NumPy, torch)."""
    import random

    import numpy
    import torch

    value = seed_of(seed, "rank", rank())
    random.seed(value)
    numpy.random.seed(value % 2**32)
    torch.manual_seed(value)


def wandb_key_present() -> bool:
    """A key in the environment, or one that `wandb login` left in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="replace")


def wandb_mode(setting: str) -> str:
    """The mode for `logging.wandb`: `auto` is online with a key and offline without; WANDB_MODE overrides `auto`."""
    if setting != "auto":
        return setting
    return os.environ.get("WANDB_MODE") or ("online" if wandb_key_present() else "offline")


def fault_point(name: str) -> None:
    """Die here, hard, if the environment says so: how tests interrupt a run in the middle of a checkpoint.

    NSA_TRAIN_KILL_AT=<name> kills this process with SIGKILL at the first point of that name.
    """
    if os.environ.get("NSA_TRAIN_KILL_AT") == name:
        os.kill(os.getpid(), 9)


def setup_console() -> None:
    """Our own lines at INFO on rank 0; other libraries and other ranks only when something is wrong."""
    logging.raiseExceptions = False  # a closed pipe (`| head`) is no event worth a traceback a line
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    log.setLevel(logging.INFO if rank() == 0 else logging.WARNING)


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file so that whoever is killed or reads meanwhile finds the old or the new one. Raises OSError."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_bytes(content)
    os.replace(aside, path)


def readable_as_its_folder(path: Path) -> None:
    """Give a file the permissions of the user's umask; safetensors writes files that only their owner can read."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def git_commit() -> str | None:
    """Commit of the source tree, with `-dirty` when it has changes; None outside a git checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


OPTIONAL = ("flash-attn-4",)


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result; an optional one only where it is installed."""
    from importlib import metadata

    found = {"python": sys.version.split()[0], "nsa_train": nsa_train.__version__}
    for package in ("torch", "triton", "deepspeed", "transformers", "numpy", "sentencepiece", "wandb", *OPTIONAL):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package not in OPTIONAL:
                found[package] = "missing"
    return found


def quiet_deepspeed(device_type: str) -> None:
    """Tell DeepSpeed which accelerator it has before it is imported and guesses aloud."""
    os.environ.setdefault("DS_ACCELERATOR", device_type)


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name(device()) if on_gpu() else "CPU"


def peak_resident_bytes() -> int:
    """Most memory that this process has had resident. (getrusage would count its parent's, from before the exec.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def peak_memory_gib() -> float:
    """Peak memory of this process: allocated on its GPU, or resident on a CPU."""
    import torch

    if on_gpu():
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_resident_bytes() / 2**30


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))
