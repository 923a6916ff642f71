"""Train the same rows from the same start with NSA on its reference and on its kernels, and compare the loss curves.

python scripts/loss_parity.py    # on a GPU: tiny and r1, 200 steps, 3 seeds, into docs/results/loss_parity_<gpu>.json

What rounding alone does to a run shows in the distance of the two runs on the kernels, which differ in rounding only.
Each trained model's held-out loss is also computed by both backends on the same weights: a model that learned to look
where its kernels should not let it, into the future say, would lose that on the reference.
Runs share the GPU: losses are compared here, not speeds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any

from nsa_train import runtime
from nsa_train.bench import results
from nsa_train.bench.runs import train_run
from nsa_train.config.load import load_config
from nsa_train.data.loader import Loader
from nsa_train.data.prepare import prepare
from nsa_train.data.stages import stages_of
from nsa_train.data.store import TokenStore
from nsa_train.errors import NsaTrainError
from nsa_train.parallel.engine import start_processes, stop_processes
from nsa_train.train.evaluate import evaluate

SMOOTHED_STEPS = 20  # the mean over so many steps is compared: single steps differ by rounding
PRESETS = {
    "r1": ["experiment=r1", "trainer.seq_len=2048", "trainer.batch_rows=2", "trainer.micro_rows=2"],
    "tiny": ["experiment=tiny", "trainer.dtype=bf16", "parallel=zero2", "trainer.micro_rows=4"],
}
CHECKPOINTED = "trainer.activation_checkpointing=true"
WAYS = {
    "reference": ["attention.backend=reference", CHECKPOINTED],  # its scores need memory
    "triton": ["attention.backend=triton"],
    "triton, compiled, checkpointed": ["attention.backend=triton", "trainer.compile=true", CHECKPOINTED],
}
PAIRS = [("triton", "reference"), ("triton, compiled, checkpointed", "reference"),
         ("triton, compiled, checkpointed", "triton")]  # fmt: skip
Case = tuple[str, str, int]  # preset, way, seed


def settings(case: Case, folder: Path, rest: list[str]) -> list[str]:
    preset, way, seed = case
    return [
        *PRESETS[preset], *WAYS[way], f"seed={seed}", f"name={run_name(case)}", f"runs_dir={folder}",
        f"data.prepared_dir={folder}/prepared", "trainer.val_every=1000", "trainer.checkpoint_every=1000",
        "trainer.log_every=1", "logging.wandb=disabled", *rest,
    ]  # fmt: skip


def run_name(case: Case) -> str:
    preset, way, seed = case
    return f"{preset}-{list(WAYS).index(way)}-{seed}"


def curve(case: Case, folder: Path, rest: list[str]) -> dict[str, Any]:
    """Train once; a row with the loss of every step, or with `error`."""
    preset, way, seed = case
    run = train_run(folder / run_name(case), settings(case, folder, rest))
    row: dict[str, Any] = {"preset": preset, "way": way, "seed": seed, "command_s": round(run.command_s, 1)}
    if run.error:
        return {**row, "error": run.error}
    return {
        **row, "loss": [round(r["loss"], 5) for r in run.logged], "val_loss_last": run.summary["val_loss_last"],
        "corpus_hash": run.summary["corpus_hash"],
    }  # fmt: skip


def heldout_loss(case: Case, folder: Path, rest: list[str], backend: str) -> float:
    """Of a finished run's export, computed with `backend`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import nsa_train.model.pretrained  # noqa: F401

    config = load_config(settings(case, folder, rest))
    export = folder / run_name(case) / "export"
    described = AutoConfig.from_pretrained(export)
    described.attention["backend"] = backend
    model = AutoModelForCausalLM.from_pretrained(export, config=described, dtype="auto").transformer
    store = TokenStore.open(prepare(config.data, config.model.vocab, print), "heldout")
    loader = Loader(store, stages_of(config), config.data, config.seed)
    device = runtime.device()
    found = evaluate(model.to(device), loader, config.trainer, store.manifest["sources"], device)
    return found["loss"]


def smoothed_gap(losses: list[float], wanted: list[float]) -> list[float]:
    """losses - wanted, as a moving mean over SMOOTHED_STEPS."""
    gaps = [a - b for a, b in zip(losses, wanted, strict=True)]
    return [statistics.fmean(gaps[i : i + SMOOTHED_STEPS]) for i in range(len(gaps) - SMOOTHED_STEPS + 1)]


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per preset and pair of ways: how far apart the curves are, of single runs and of the mean over seeds."""
    found = []
    for preset, (way, beside) in product(PRESETS, PAIRS):
        one, other = (
            {r["seed"]: r["loss"] for r in rows if (r["preset"], r["way"]) == (preset, name) and "loss" in r}
            for name in (way, beside)
        )
        seeds = sorted(one.keys() & other.keys())
        if not seeds:
            continue
        gaps = [smoothed_gap(one[seed], other[seed]) for seed in seeds]
        mean = [statistics.fmean(column) for column in zip(*gaps, strict=True)]
        first = [abs(a - b) for seed in seeds for a, b in zip(one[seed][:8], other[seed][:8], strict=True)]
        found.append(
            {"preset": preset, "way": way, "beside": beside, "seeds": seeds, "largest_in_8_steps": max(first),
             "largest_of_a_run": max(abs(x) for gap in gaps for x in gap),
             "largest_of_the_mean": max(map(abs, mean)), "mean": statistics.fmean(mean)}
        )  # fmt: skip
    return found


def check(args: argparse.Namespace, cases: list[Case], rest: list[str]) -> None:
    """Raises NsaTrainError for what would be found wrong only after runs have started."""
    if args.at_once < 1:
        raise NsaTrainError(f"--at-once {args.at_once} must be 1 or more")
    if args.steps < SMOOTHED_STEPS:
        raise NsaTrainError(f"--steps {args.steps} must be {SMOOTHED_STEPS} or more, over which losses are smoothed")
    for case in cases:
        if case[0] not in PRESETS:
            raise NsaTrainError(f"there is no preset {case[0]!r} here; there are {', '.join(PRESETS)}")
        load_config(settings(case, Path("runs"), rest))
    if not runtime.on_gpu():
        raise NsaTrainError("no CUDA device here; it compares runs on the kernels, which need one")
    results.make_folder(args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=list(PRESETS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=3e-4, help="low: rounding grows fast at a high one")
    parser.add_argument("--at-once", type=int, default=5, help="runs that share the GPU")
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    parser.add_argument("--commit", help="source commit, where the tree is no git checkout")
    args = parser.parse_args()
    rest = [f"trainer.steps={args.steps}", f"optim.lr={args.lr}"]
    cases = [(preset, way, seed) for preset in args.presets for way in WAYS for seed in args.seeds]
    try:
        check(args, cases, rest)
    except NsaTrainError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    rows: dict[Case, dict[str, Any]] = {}
    name = f"loss_parity_{results.gpu_label()}"

    def write() -> Path:
        done = [rows[case] for case in cases if case in rows]
        return results.write_result(name, "loss_parity", [*compare(done), *done], args.commit, args.out)

    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(args.at_once) as pool:
        folder = Path(place)
        for preset in args.presets:  # once, before many would wait for one
            prepared = ["prepare", *PRESETS[preset], f"data.prepared_dir={folder}/prepared"]
            subprocess.run([sys.executable, "-m", "nsa_train", *prepared], check=True)
        jobs = {pool.submit(curve, case, folder, rest): case for case in cases}
        runtime.launch_alone()
        start_processes(runtime.device(), timeout_s=600)
        for done in as_completed(jobs):
            row = rows[jobs[done]] = done.result()
            if "error" not in row:
                row["heldout_by"] = {
                    backend: heldout_loss(jobs[done], folder, rest, backend) for backend in ("reference", "triton")
                }
            print({k: v for k, v in row.items() if k != "loss"}, flush=True)
            write()
        stop_processes()
    for line in compare(list(rows.values())):
        print(line)
    print(write())


if __name__ == "__main__":
    main()
