"""A run that only reads, as a process for each rank.

It goes on from start.json in its folder, adds a line of digests per step to a file for each rank, and saves its state
in state.json every fourth step.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
from loaders import make_loader, stage
from server import SERVER

from nsa_train.data.store import TokenStore

SAVE_EVERY, STEPS = 4, 40
STAGES = [stage(0, 256, 12), stage(9, 512, 6, a=0.7, b=0.3)]


def open_store(folder: Path) -> TokenStore:
    load = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "offsets", "sources")}
    return TokenStore(folder, "train", {"hash": "x", "sources": ["a", "b"]}, **load)


def read(folder: Path, rank: int, world: int, until: int, die: bool) -> None:
    """One rank, to step `until`; with `die` it kills itself there, having read more than rank 0 saved."""
    loader = make_loader(open_store(folder), stages=STAGES, max_documents=64, align=8, packing="long")
    first = 0
    if (folder / "start.json").exists():
        state = json.loads((folder / "start.json").read_text())
        loader.check_state(state, STEPS)
        first = state["step"]
    with (folder / f"rank{rank}of{world}.txt").open("a") as out:
        for step in range(first, until):
            digests = []
            for batch in loader.micro_batches(step, rank, world, 2):
                content = (batch.tokens, batch.labels, batch.sources.long(), batch.places.long())
                for row in np.stack(content).reshape(4, -1, loader.stage(step).seq_len).swapaxes(0, 1):
                    digests.append(hashlib.sha256(row.tobytes()).hexdigest()[:16])
            print(step, *digests, file=out, flush=True)
            if rank == 0 and (step + 1) % SAVE_EVERY == 0:
                (folder / "state.json").write_text(json.dumps(loader.state(step + 1, STEPS)))
    if die:
        os.kill(os.getpid(), 9)


def run(folder: Path, world: int, until: int, die: bool = False) -> list[int | None]:
    """All ranks, from where the last run saved its state; their exit codes. What it read beyond is forgotten."""
    if (folder / "state.json").exists():
        shutil.copy(folder / "state.json", folder / "start.json")
        first = json.loads((folder / "start.json").read_text())["step"]
        for file in folder.glob("rank*.txt"):
            lines = file.read_text().splitlines(keepends=True)
            file.write_text("".join(line for line in lines if int(line.split()[0]) < first))
    ranks = [SERVER.Process(target=read, args=(folder, rank, world, until, die)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    return [process.exitcode for process in ranks]
