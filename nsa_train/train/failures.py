"""How a run that fails ends: the first error of any rank is the one that all of them report."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from nsa_train import runtime
from nsa_train.errors import DivergedError, Interrupted, NsaTrainError, OtherRankFailed, StorageError

# In the run folder: {"rank", "exit_code", "message"} of the rank that failed first, and whether all "agreed" to end.
FIRST_FAILURE = ".failure.json"


def failure_of(error: BaseException, run_dir: Path) -> BaseException:
    """What a rank raises for `error`.

    A full disk as StorageError, a Ctrl-C that stops at once as Interrupted, what another rank's end brought about as
    OtherRankFailed with that rank's words, any other error as it is.
    """
    failure = error
    if isinstance(error, OSError) and error.errno in runtime.STORAGE_ERRORS:
        failure = StorageError(f"{runtime.storage_message(error)} and run again")
    elif isinstance(error, KeyboardInterrupt):
        failure = Interrupted("stopped at once; the same command goes on from the last checkpoint, if there is one")
    agreed = isinstance(error, (Interrupted, DivergedError))  # every rank raises these by itself
    first = _first(failure, run_dir, agreed) if runtime.world_size() > 1 else None
    # A launcher stops the others of a rank that failed by a signal, which says nothing of its own.
    if first and (isinstance(error, KeyboardInterrupt) or not isinstance(failure, NsaTrainError)):
        failure = OtherRankFailed(f"rank {first['rank']} failed first: {first['message']}", first["exit_code"])
    if failure is not error:
        failure.__cause__ = error
    return failure


def ending_of(failure: BaseException) -> dict[str, Any]:
    """status and exit_code for summary.json."""
    code = _code(failure)
    return {"status": "interrupted" if code == Interrupted.exit_code else "failed", "exit_code": code}


def _code(failure: BaseException) -> int:
    return failure.exit_code if isinstance(failure, NsaTrainError) else 1


def _first(failure: BaseException, run_dir: Path, agreed: bool) -> dict[str, Any] | None:
    """Another rank's failure that was there before this one; where there is none, this one is noted."""
    path, own = run_dir / FIRST_FAILURE, run_dir / f"{FIRST_FAILURE}.{runtime.rank()}"
    message = str(failure) if isinstance(failure, NsaTrainError) else f"{type(failure).__name__}: {failure}"
    try:
        note = {"rank": runtime.rank(), "exit_code": _code(failure), "message": message, "agreed": agreed}
        own.write_text(json.dumps(note))
        os.link(own, path)  # whole, and only for the first
    except FileExistsError:
        return json.loads(path.read_text())
    except OSError:
        pass  # a disk that takes no note: every rank speaks for itself
    finally:
        with contextlib.suppress(OSError):
            own.unlink()
    return None
