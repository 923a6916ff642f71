"""The tables of measured corpora in docs/data.md, and the figures behind them in docs/results/corpora.json.

python scripts/corpora.py prepared/linux-... prepared/folder-...   # from corpora that `nsa-train prepare` made
python scripts/corpora.py --check                                  # exit 1 if the tables say something else
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nsa_train.data.store import REMEDY, read_manifest
from nsa_train.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "corpora.json"
PAGE = ROOT / "docs" / "data.md"
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
SPLIT_KEYS = ("documents", "tokens", "bytes", "bytes_per_token", "share_in_long", "share_past", "longest")


def row(folder: Path) -> dict[str, Any]:
    """The figures of a prepared corpus. Raises DataError where there is none, or where it was not prepared at once."""
    manifest = read_manifest(folder)
    try:
        facts = json.loads((folder / "preparation.json").read_text())
        resumed = facts["shards_found"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'preparation.json'}: no facts of a preparation ({error!r}); {REMEDY}") from error
    if resumed:
        raise DataError(f"{folder}: its preparation was resumed, so its times are not those of a whole one; {REMEDY}")
    splits = {split: {key: manifest[split][key] for key in SPLIT_KEYS} for split in ("train", "heldout")}
    licences = sorted({one for source in manifest["train"]["sources"].values() for one in source["licences"]})
    head = {key: manifest[key] for key in ("name", "hash", "vocab", "tokenizer_sha256", "left_out", "unigram_entropy")}
    return {**head, "licences": licences, **splits, "packing": manifest["train"]["packing"], **facts}


def corpora(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield (
        "| corpus | vocabulary | documents | text | tokens | bytes a token | in documents >= 8k / 32k / 64k | "
        "longest | time | tokens/s a core | peak memory |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for entry in rows:
        train = entry["train"]
        shares = " / ".join(f"{share:.0%}" for share in train["share_in_long"].values())
        yield (
            f"| `{entry['name']}` | {entry['vocab']:,} | {train['documents']:,} | {train['bytes'] / 1e6:,.1f} MB | "
            f"{train['tokens']:,} | {train['bytes_per_token']:.2f} | {shares} | {train['longest']:,} | "
            f"{entry['wall_s']:.0f} s | {entry['tokens_per_core_s'] / 1e6:.2f}M | "
            f"{entry['peak_mib']} + {entry['workers']} x {entry['peak_worker_mib']} MiB |"
        )


def packing(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| corpus | tokens in a row | rows | utilisation | with `data.align=64` | time of the plan |"
    yield "|---|---|---|---|---|---|"
    for entry in rows:
        for seq_len, numbers in entry["packing"]["rows"].items():
            yield (
                f"| `{entry['name']}` | {int(seq_len):,} | {numbers['rows']:,} | {numbers['utilisation']:.2%} | "
                f"{numbers['utilisation_align_64']:.2%} | {entry['packing_s'][seq_len]:.3f} s |"
            )


TABLES = {"corpora": corpora, "packing": packing}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("folders", nargs="*", type=Path, default=[], help="of prepared corpora; default: those measured")
    what.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    if args.folders:
        from nsa_train.bench.results import write_result

        try:
            measured = [row(folder) for folder in args.folders]
        except DataError as error:
            parser.exit(error.exit_code, f"error: {error}\n")
        write_result("corpora", "corpora", measured)
    before = PAGE.read_text()
    rows = json.loads(RESULTS.read_text())["rows"]
    after = PLACE.sub(lambda place: place[1] + "".join(f"{line}\n" for line in TABLES[place[2]](rows)), before)
    if not args.check:
        PAGE.write_text(after)
    elif before != after:
        print("docs/data.md differs from docs/results/corpora.json: run python scripts/corpora.py", file=sys.stderr)
    return int(args.check and before != after)


if __name__ == "__main__":
    sys.exit(main())
