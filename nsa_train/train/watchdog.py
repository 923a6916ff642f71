"""A process beside each rank that ends it when nothing happens any more, after writing where every thread stands.

It is a process because a rank that is stopped, or that hangs while it holds Python's lock, runs no thread of its own.
The rank sends a byte when a step, a validation or a checkpoint has ended, and before the first step when a part of the
start has. Once none came for too long its stacks go to `stacks_rank_<r>.txt` and the rank ends with 19. All ranks end
their steps together, so a hung one stops all of them, and each watchdog writes its own rank's stacks: the rank that
hangs is the one that waits for no other.

It also ends a rank that waits for one that has failed, which NCCL would do for ever.
Run as a script it is the watching side, which imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

HANG = 19
BEAT, END = b".", b"q"
POLL_S = 0.5
STACKS_S = 2.0  # for stacks to arrive, and for the other ranks' watchdogs to see the same hang
OBEY_S = 5.0  # for a rank to end by itself
FAILED_FIRST_S = 5.0  # until a rank has noticed that another one failed; later it never will
BEFORE_COLLECTIVES_S = 30.0  # that give up after `timeout_s`: ranks that wait in one would end without stacks
STEPS = "no step, validation or checkpoint ended in {:g} s (parallel.hang_s)"
START = f"no part of the start ended in {{:g}} s (parallel.timeout_s less {BEFORE_COLLECTIVES_S:g}, or parallel.hang_s)"


def start_limit_s(hang_s: float, timeout_s: float) -> float:
    """Seconds that a part of the start may take, loading a large checkpoint among them."""
    return max(hang_s, timeout_s - BEFORE_COLLECTIVES_S)


class Watchdog:
    """The rank's side. A context manager."""

    def __init__(self, run_dir: Path, limit_s: float, rank: int, first_failure: str, late: str = STEPS) -> None:
        command = [
            sys.executable,
            "-I",
            __file__,
            str(os.getpid()),
            str(limit_s),
            str(run_dir),
            str(rank),
            first_failure,
            late,
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        assert self._process.stdin
        self._pipe = self._process.stdin
        faulthandler.register(signal.SIGUSR2, file=self._pipe, all_threads=True)
        threading.Thread(target=self._obey, daemon=True).start()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def beat(self) -> None:
        """Something has ended."""
        with contextlib.suppress(BrokenPipeError):  # a run goes on without its watchdog
            os.write(self._pipe.fileno(), BEAT)

    def stop(self) -> None:
        faulthandler.unregister(signal.SIGUSR2)
        with contextlib.suppress(BrokenPipeError):
            os.write(self._pipe.fileno(), END)  # a process forked from this one may keep the pipe open
            self._pipe.close()
        self._process.wait()

    def _obey(self) -> None:
        """End with the code that the watchdog says, whatever the main thread waits for."""
        assert self._process.stdout
        if code := self._process.stdout.readline():
            os._exit(int(code))


class _Watched:
    """The watching side."""

    def __init__(self, pid: int, limit_s: float, run_dir: Path, rank: int, first_failure: Path, late: str) -> None:
        self.pid, self.limit_s, self.run_dir, self.rank, self.first_failure = pid, limit_s, run_dir, rank, first_failure
        self.late = late

    @property
    def alive(self) -> bool:
        return os.getppid() == self.pid

    def watch(self) -> None:
        """Until the rank has ended, by itself or from here."""
        beat, failed = time.monotonic(), None
        while self.alive:
            now = time.monotonic()
            if select.select([0], [], [], POLL_S)[0]:
                found = os.read(0, 65536)
                if not found or found.endswith(END):
                    return
                beat = now
            elif now - beat > self.limit_s:
                return self.end_hang()
            elif first := self.another_failed():
                failed = failed or now
                if now - failed > FAILED_FIRST_S:
                    return self.end(first["exit_code"], f"rank {first['rank']} failed first: {first['message']}")

    def end_hang(self) -> None:
        place = self.run_dir / f"stacks_rank_{self.rank}.txt"
        stacks = self.stacks()
        with contextlib.suppress(OSError):  # a full disk must not keep a hung rank alive
            place.write_bytes(stacks)
        self.end(HANG, f"{self.late.format(self.limit_s)}; stacks: {place}")

    def another_failed(self) -> dict[str, Any] | None:
        """What another rank noted that failed first. Where this one did, or all agreed to end, it is to end in time."""
        if not self.first_failure.exists():
            return None
        first = json.loads(self.first_failure.read_text())
        return None if first["agreed"] or first["rank"] == self.rank else first

    def stacks(self) -> bytes:
        """What faulthandler writes into the pipe of the beats when the signal comes; a stopped rank is woken for it.

        The signal is for the main thread: it writes before it does anything else.
        """
        ctypes.CDLL(None).tgkill(self.pid, self.pid, int(signal.SIGUSR2))
        os.kill(self.pid, signal.SIGCONT)
        found, deadline = b"", time.monotonic() + STACKS_S
        while (left := deadline - time.monotonic()) > 0:
            if select.select([0], [], [], left)[0]:
                found += (part := os.read(0, 65536))
                if not part:
                    break
        time.sleep(max(0.0, left))
        return found.strip(BEAT + END)

    def end(self, code: int, message: str) -> None:
        print(f"error: rank {self.rank} on {os.uname().nodename}: {message}", file=sys.stderr, flush=True)
        if self.rank == 0:
            with contextlib.suppress(OSError, ValueError):
                self.summarise(code)
        print(code, flush=True)
        deadline = time.monotonic() + OBEY_S
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.1)
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)

    def summarise(self, code: int) -> None:
        """summary.json, which the rank cannot write any more."""
        place, aside = self.run_dir / "summary.json", self.run_dir / ".summary.json.tmp"
        before = json.loads(place.read_text()) if place.exists() else {"steps": 0}
        logged = self.logged_last()
        if logged.get("steps", 0) > before.get("steps", 0):  # else an earlier launch came further than it logged
            before |= logged
        aside.write_text(json.dumps({**before, "status": "failed", "exit_code": code}, indent=1) + "\n")
        os.replace(aside, place)

    def logged_last(self) -> dict[str, int]:
        """Steps and tokens of the last whole line of metrics.jsonl; nothing where there is none."""
        try:
            lines = (self.run_dir / "metrics.jsonl").read_text(errors="replace").splitlines()
        except OSError:
            return {}
        for line in reversed(lines):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                row = json.loads(line)
                return {"steps": row["step"], "tokens": row["tokens"]}
        return {}


if __name__ == "__main__":
    pid, limit_s, run_dir, rank, first_failure, late = sys.argv[1:]
    _Watched(int(pid), float(limit_s), Path(run_dir), int(rank), Path(run_dir) / first_failure, late).watch()
