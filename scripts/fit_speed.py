"""Shares of a GPU's peak by part, from result files, as they stand in nsa_train/plan/speed.py.

python scripts/fit_speed.py docs/results/training_h200.json docs/results/attention_h100.json

Of a training file count the rows with arm `nsa` that have a profile; of a preset's at one length and number of GPUs
that with most rows a forward pass, which leaves least of the GPU idle; of those with the same size the one with the
shortest rows on the fewest GPUs. Of an attention file count the fastest dense kernels of one document, which give
`attention, full`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nsa_train.bench.figures import totals
from nsa_train.bench.results import read_result
from nsa_train.bench.training import settings_of
from nsa_train.config.load import load_config
from nsa_train.data.stages import at_stage, stages_of
from nsa_train.errors import NsaTrainError
from nsa_train.plan.speed import GPUS, Gpu, fitted, kind_of
from nsa_train.train.profile import DATA, HOST


def of_training(gpu: Gpu, rows: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    fullest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in (row for row in rows if row["attention"] == "nsa" and row.get("parts")):
        at = row["preset"], row["T"], row["gpus"]
        fullest[at] = max(row, fullest.get(at, row), key=lambda one: one["micro_batch"])  # the later one of two alike
    for row in sorted(fullest.values(), key=lambda row: (row["T"], row["gpus"]), reverse=True):
        config = load_config(settings_of(row))
        config = at_stage(config, stages_of(config)[0], row["gpus"])
        on_gpu = {part: ms for part, ms in row["parts"].items() if part not in (DATA, HOST)}
        for part, shares in fitted(config, gpu, row["gpus"], on_gpu).items():
            found[part] = found.get(part, {}) | shares
    return found


def of_attention(gpu: Gpu, rows: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Mean over the lengths, of the kernels that every installation has."""
    dense = [row for row in rows if row["part"] == "dense" and row["impl"].startswith("torch-")]
    found: dict[int, float] = {}
    for widths in {(row["d_qk"], row["d_v"]): None for row in dense}:
        heads = next(row["Hq"] for row in dense if (row["d_qk"], row["d_v"]) == widths)
        fastest: dict[int, float] = {}
        for by_length in totals(dense, widths, "dense", 1).values():
            fastest |= {T: min(ms, fastest.get(T, ms)) for T, ms in by_length.items()}
        flops = {T: 3 * 2 * heads * sum(widths) * T * (T + 1) / 2 for T in fastest}
        shares = [flops[T] / gpu.flops / (ms / 1e3) for T, ms in fastest.items()]
        found[widths[0]] = sum(shares) / len(shares)
    return {"attention, full": found}


OF = {"training": of_training, "attention": of_attention}


def show(path: Path) -> None:
    """Raises NsaTrainError where it is no result of a benchmark in `OF`, or of a GPU that is not in the table."""
    bench = path.name.partition("_")[0]
    if bench not in OF:
        raise NsaTrainError(f"{path}: its name must begin with {' or '.join(f'{name}_' for name in OF)}")
    result = read_result(path, bench, "file", f"nsa-train bench {bench}")
    kind = kind_of(result["device"]["name"])
    if kind is None:
        raise NsaTrainError(f"{path}: add {result['device']['name']} to nsa_train/plan/speed.py first")
    print(f"# {result['device']['name']}, {result['date']}, {(result['commit'] or '-')[:7]}: {result['command']}")
    for part, shares in OF[bench](GPUS[kind], result["rows"]).items():
        print(f'"{part}": {{{", ".join(f"{size}: {share:.3f}" for size, share in sorted(shares.items()))}}},')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="training_<gpu>.json, attention_<gpu>.json")
    try:
        for path in parser.parse_args().files:
            show(path)
    except NsaTrainError as error:
        parser.exit(error.exit_code, f"error: {error}\n")


if __name__ == "__main__":
    main()
