"""Train the same rows from the same start with NSA on its reference and on its kernels, and compare the loss curves.

python scripts/loss_parity.py    # on a GPU: tiny and r1, 200 steps each, into docs/results/loss_parity_<gpu>.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nsa_train.bench import results
from nsa_train.train.metrics import METRICS, read_metrics

SMOOTHED_STEPS = 20  # the mean over so many steps is compared: single steps differ by rounding
PRESETS = {
    "tiny": ["experiment=tiny", "trainer.dtype=bf16", "parallel=zero2"],
    "r1": ["experiment=r1", "trainer.seq_len=2048", "trainer.batch_rows=8", "trainer.micro_rows=8", "optim.lr=1e-3"],
}
WAYS = {
    "reference": ["attention.backend=reference"],
    "triton": ["attention.backend=triton"],
    "triton, compiled, checkpointed": [
        "attention.backend=triton", "trainer.compile=true", "trainer.activation_checkpointing=true",
    ],
}  # fmt: skip


def curve(preset: str, way: str, steps: int, folder: Path) -> dict[str, Any]:
    """Train once; a row with the loss of every step, or with `error`."""
    name = f"{preset}-{way.split(',')[0]}-{len(way)}"
    command = [
        sys.executable, "-m", "nsa_train", "train", *PRESETS[preset], *WAYS[way], f"trainer.steps={steps}",
        f"name={name}", f"runs_dir={folder}", f"data.prepared_dir={folder}/prepared", "trainer.log_every=1",
        f"trainer.val_every={steps}", f"trainer.checkpoint_every={steps}", "trainer.export=false",
        "logging.wandb=disabled",
    ]  # fmt: skip
    row: dict[str, Any] = {"preset": preset, "way": way, "steps": steps}
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    row["command_s"] = time.perf_counter() - started
    if done.returncode:
        return {**row, "error": f"exit code {done.returncode}: {done.stderr.strip()[-300:]}"}
    steps_done = [r for r in read_metrics(folder / name / METRICS) if r["split"] == "train"]
    speeds = sorted(r["tokens_per_s"] for r in steps_done[len(steps_done) // 2 :])
    summary = json.loads((folder / name / "summary.json").read_text())
    return {
        **row, "loss": [r["loss"] for r in steps_done], "tokens_per_s": speeds[len(speeds) // 2],
        "val_loss_last": summary["val_loss_last"], "corpus_hash": summary["corpus_hash"],
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
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for preset in args.presets:
            reference = curve(preset, "reference", args.steps, Path(folder))
            rows.append(reference)
            for way in [way for way in WAYS if way != "reference"]:
                row = curve(preset, way, args.steps, Path(folder))
                if "loss" in row and "loss" in reference:
                    row["largest_difference"] = largest_difference(row["loss"], reference["loss"])
                rows.append(row)
                print({k: v for k, v in row.items() if k != "loss"}, flush=True)
    print(results.write_result(f"loss_parity_{results.gpu_label()}", "loss_parity", rows, args.commit, args.out))


if __name__ == "__main__":
    main()
