"""`nsa-train compare RUN...`: finished runs side by side, into comparison_<name>.json, .md and .png.

`nsa-train compare gates` is what must pass before; `nsa-train compare keep` makes a small file of each run.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nsa_train import runtime
from nsa_train.bench import results
from nsa_train.bench.figures import plot_grids
from nsa_train.compare import gates
from nsa_train.compare.figure import plot_comparison
from nsa_train.compare.markdown import markdown
from nsa_train.compare.rates import Rates
from nsa_train.compare.report import grid_rows, rows_of
from nsa_train.compare.runs import Arms, Run
from nsa_train.compare.speeds import Speeds
from nsa_train.config.schema import Config
from nsa_train.errors import ConfigError, NsaTrainError, RunFolderError

OF_GATES = {  # in every row of theirs
    "experiment": str, "arm": str, "gate": str, "passed": bool, "found": str, "demanded": str, "device": str,
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Compare and write the report, or run the gates, or keep runs; the exit code."""
    if arguments[:1] == ["gates"]:
        return gates.main(arguments[1:])
    if arguments[:1] == ["keep"]:
        return _keep(arguments[1:])
    parser = argparse.ArgumentParser(prog="nsa-train compare", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run, or its kept file")
    parser.add_argument("--name", help="of the report; default: the experiment's")
    about = "JSON of `nsa-train compare gates`, printed in the report; may be repeated, each for other arms"
    parser.add_argument("--gates", action="append", default=[], type=Path, metavar="FILE", help=about)
    about = "JSON of the sweep that the runs' learning rates come from, printed in the report"
    parser.add_argument("--rates", type=Path, metavar="FILE", help=about)
    about = "JSON of `nsa-train bench training`: seconds of runs that shared a device are by their arm's speed there"
    parser.add_argument("--speeds", type=Path, metavar="FILE", help=about)
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of the report")
    args = parser.parse_args(arguments)
    arms = Arms.read(args.runs)
    name = results.safe_name(args.name or arms.all[0].config.experiment)
    configs = [run.config for run in arms.all]
    speeds = Speeds.read(args.speeds, arms.all) if args.speeds else None
    rows = rows_of(arms, read_gates(args.gates, configs), speeds)
    rows += Rates.read(args.rates).rows_of(configs) if args.rates else []
    path = args.out / f"comparison_{name}.json"
    grids = grid_rows(arms, path.stem)
    rows += [*grids, *_copied_maps(arms, path)]
    results.write_result(path.stem, "comparison", rows, folder=args.out)
    plot_comparison(rows, path.with_suffix(".png"))
    for figure in dict.fromkeys(row["figure"] for row in grids):
        mine = (row for row in grids if row["figure"] == figure)
        plot_grids({f"{row['task']}: {row['arm']}": row["cells"] for row in mine}, path.with_name(figure))
    text = markdown(json.loads(path.read_text()), path.with_suffix(".png").name)
    path.with_suffix(".md").write_text(text)
    runtime.log.info("%s\n%s", text.partition("\n## Gates")[0], path.with_suffix(".md"))
    return 0


def _keep(arguments: list[str]) -> int:
    """A file for each run that is finished; raises NsaTrainError with the reasons of those that are not kept."""
    about = (
        "What `nsa-train compare` reads of finished runs, each as one small file <run>.json.xz, and its maps beside it."
    )
    parser = argparse.ArgumentParser(prog="nsa-train compare keep", description=about)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--out", type=Path, default=results.RESULTS / "runs", help="folder of the files")
    args = parser.parse_args(arguments)
    problems = []
    for folder in args.runs:
        try:
            path, written = Run.read(folder).keep(args.out)
            runtime.log.info("%s: %d bytes%s", path, path.stat().st_size, "" if written else ", is already there")
        except (RunFolderError, ConfigError) as error:
            problems.append(str(error))
    if problems:
        raise NsaTrainError("these runs are not kept:\n" + "\n".join(f"  {line}" for line in problems))
    return 0


def _copied_maps(arms: Arms, report: Path) -> list[dict[str, Any]]:
    """Attention maps of each arm's first run that has any, copied beside the report: a row for each."""
    rows: list[dict[str, Any]] = []
    for runs in arms.runs.values():
        for run in [run for run in runs if run.maps.is_file()][:1]:
            copy = report.with_name(f"{report.stem}_maps_{run.arm}.png")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run.maps, copy)
            rows.append({"what": "maps", "arm": run.arm, "seed": run.seed, "figure": copy.name})
    return rows


def read_gates(paths: Sequence[Path], configs: Sequence[Config]) -> list[dict[str, Any]]:
    """Rows of the gates of runs with these configurations; those of other arms are left out.

    Raises NsaTrainError where a file has none, where two have gates of one arm, and where they are of another model.
    """
    rows: list[dict[str, Any]] = []
    asked = {config.arm: gates.recipe(config) for config in configs}
    for path in paths:
        found = _gates(path, configs[0].experiment)
        if twice := {row["arm"] for row in rows} & {row["arm"] for row in found}:
            raise NsaTrainError(f"--gates {path}: an earlier file has gates of {', '.join(sorted(twice))}, too")
        told = {row["arm"]: row.get("recipe") for row in found}  # files of before have none
        if others := {arm for arm, recipe in told.items() if recipe != asked.get(arm, recipe or "unknown")}:
            raise NsaTrainError(
                f"--gates {path}: {', '.join(sorted(others))} had another model, attention, moe or trainer.dtype "
                "there than in the runs; run `nsa-train compare gates` again with what --set says of the runs"
            )
        rows += found
    return [row for row in rows if row["arm"] in asked]


def _gates(path: Path, experiment: str) -> list[dict[str, Any]]:
    rows = results.read_result(path, "gates", "--gates", "`nsa-train compare gates`")["rows"]
    if not all(isinstance(row, dict) and all(isinstance(row.get(k), t) for k, t in OF_GATES.items()) for row in rows):
        raise NsaTrainError(
            f"--gates {path}: rows must be objects, each with {', '.join(OF_GATES)}; run the gates again"
        )
    if others := {row["experiment"] for row in rows} - {experiment}:
        raise NsaTrainError(f"--gates {path}: of {', '.join(sorted(others))}, but the runs are of {experiment}")
    return rows
