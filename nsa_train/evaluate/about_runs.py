"""What scripts that question finished runs have in common: which runs, where findings go, and what is refused first."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nsa_train import runtime
from nsa_train.bench import results
from nsa_train.config.schema import Config
from nsa_train.errors import NsaTrainError
from nsa_train.evaluate.command import Options, check_fits
from nsa_train.train.folder import read_config


def about_runs(
    name: str, parser: argparse.ArgumentParser, words: Callable[[argparse.Namespace], list[str]],
    rows: Callable[[Path, Config, Options], Iterable[dict[str, Any]]],
) -> int:  # fmt: skip
    """Question each run that the command line names; write <out>/<name>.json, a run's rows in place of earlier ones.

    words  those of `nsa-train eval` that stand for the parser's arguments
    rows   of a run, each with the run's folder as `run`
    gives  the exit code; what does not fit, and a file that cannot be added to, is told before any run is questioned
    """
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the findings")
    args = parser.parse_args()
    runtime.setup_console()
    file = args.out / f"{name}.json"
    try:
        options = Options.parse(words(args))
        configs = {run: read_config(run) for run in args.runs}
        for run, config in configs.items():
            check_fits(run, config, options)
        results.with_earlier(file, [], lambda row: row["run"])
        for run, config in configs.items():
            now = [row | results.source(None) for row in rows(run, config, options)]
            found = results.with_earlier(file, now, lambda row: row["run"])
            print(results.write_result(name, name, found, folder=args.out))
    except NsaTrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
