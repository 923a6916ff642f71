"""A run that only reads: one process per rank, as a program of its own.

    read_batches.py STORE RANK WORLD UNTIL [--die]

Goes on from STORE/start.json, reads to step UNTIL and adds a line of digests per step to STORE/rank<RANK>of<WORLD>.txt;
rank 0 saves its state in STORE/state.json every fourth step. With --die it kills itself at UNTIL, having read more
than it saved.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
from loaders import make_loader, stage

from nsa_train.data.store import TokenStore

SAVE_EVERY = 4
STAGES = [stage(0, 256, 12), stage(9, 512, 6, a=0.7, b=0.3)]


def open_store(folder: Path) -> TokenStore:
    load = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "offsets", "sources")}
    return TokenStore(folder, "train", {"hash": "x", "sources": ["a", "b"]}, **load)


def main() -> None:
    folder, rank, world, until = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    loader = make_loader(open_store(folder), stages=STAGES, max_documents=64, align=8, packing="long")
    first = 0
    if (folder / "start.json").exists():
        state = json.loads((folder / "start.json").read_text())
        loader.check_state(state)
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
                (folder / "state.json").write_text(json.dumps(loader.state(step + 1)))
    if "--die" in sys.argv:
        os.kill(os.getpid(), 9)


if __name__ == "__main__":
    main()
