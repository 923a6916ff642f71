"""Train the same rows from the same start with NSA on its reference and on its kernels, and compare the loss curves.

python scripts/loss_parity.py    # on a GPU: tiny and r1, 200 steps each, into docs/results/loss_parity_<gpu>.json

All runs share the GPU at the same time: losses are compared here, not speeds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from nsa_train.bench import results
from nsa_train.bench.runs import train_run

SMOOTHED_STEPS = 20  # the mean over so many steps is compared: single steps differ by rounding
PRESETS = {
    "tiny": ["experiment=tiny", "trainer.dtype=bf16", "parallel=zero2"],
    "r1": ["experiment=r1", "trainer.seq_len=2048", "trainer.batch_rows=8", "trainer.micro_rows=8", "optim.lr=1e-3"],
}
WAYS = {
    "reference": ["attention.backend=reference", "trainer.activation_checkpointing=true"],  # its scores need memory
    "triton": ["attention.backend=triton"],
    "triton, compiled, checkpointed": [
        "attention.backend=triton", "trainer.compile=true", "trainer.activation_checkpointing=true",
    ],
}  # fmt: skip


def curve(preset: str, way: str, steps: int, folder: Path) -> dict[str, Any]:
    """Train once; a row with the loss of every step, or with `error`."""
    name = f"{preset}-{way.split(',')[0]}-{len(way)}"
    overrides = [
        *PRESETS[preset], *WAYS[way], f"trainer.steps={steps}", f"name={name}", f"runs_dir={folder}",
        f"data.prepared_dir={folder}/prepared", "trainer.log_every=1",
        f"trainer.val_every={steps}", f"trainer.checkpoint_every={steps}", "trainer.export=false",
        "logging.wandb=disabled",
    ]  # fmt: skip
    run = train_run(folder / name, overrides)
    row: dict[str, Any] = {"preset": preset, "way": way, "steps": steps, "command_s": run.command_s}
    if run.error:
        return {**row, "error": run.error}
    return {
        **row, "loss": [r["loss"] for r in run.logged], "val_loss_last": run.summary["val_loss_last"],
        "corpus_hash": run.summary["corpus_hash"],
    }  # fmt: skip


def largest_difference(losses: list[float], wanted: list[float]) -> float:
    """Largest difference of the two curves, each a moving mean over SMOOTHED_STEPS."""
    gaps = [a - b for a, b in zip(losses, wanted, strict=True)]
    means = [sum(gaps[i : i + SMOOTHED_STEPS]) / SMOOTHED_STEPS for i in range(len(gaps) - SMOOTHED_STEPS + 1)]
    return max(map(abs, means))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=list(PRESETS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    parser.add_argument("--commit", help="source commit, where the tree is no git checkout")
    args = parser.parse_args()
    cases = [(preset, way) for preset in args.presets for way in WAYS]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(cases)) as pool:
        for preset in args.presets:  # once, before many would wait for one
            prepare = ["prepare", *PRESETS[preset], f"data.prepared_dir={folder}/prepared"]
            subprocess.run([sys.executable, "-m", "nsa_train", *prepare], check=True)
        jobs = {pool.submit(curve, *case, args.steps, Path(folder)): case for case in cases}
        for done in as_completed(jobs):
            rows[jobs[done]] = done.result()
            print({k: v for k, v in done.result().items() if k != "loss"}, flush=True)
    for preset, way in cases:
        row, reference = rows[preset, way], rows[preset, "reference"]
        if way != "reference" and "loss" in row and "loss" in reference:
            row["largest_difference"] = largest_difference(row["loss"], reference["loss"])
    name = f"loss_parity_{results.gpu_label()}"
    print(results.write_result(name, "loss_parity", list(rows.values()), args.commit, args.out))


if __name__ == "__main__":
    main()
