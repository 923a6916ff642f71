"""The tables of measured corpora in docs/data.md, and the figures behind them in docs/results/corpora.json.

python scripts/corpora.py prepared/linux-... prepared/folder-...   # from corpora that `nsa-train prepare` made
python scripts/corpora.py --check                                  # exit 1 if the tables say something else
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "corpora.json"
PAGE = ROOT / "docs" / "data.md"
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
SPLIT_KEYS = ("documents", "tokens", "bytes", "bytes_per_token", "share_in_long", "share_past", "longest")


def row(folder: Path) -> dict[str, Any]:
    """The figures of a prepared corpus."""
    manifest = json.loads((folder / "manifest.json").read_text())
    facts = json.loads((folder / "preparation.json").read_text())
    if facts["shards_found"]:
        raise SystemExit(f"{folder}: its preparation was resumed, so its times are not those of a whole one")
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
    check, folders = "--check" in sys.argv, [Path(word) for word in sys.argv[1:] if word != "--check"]
    if folders:
        from nsa_train.bench.results import write_result

        write_result("corpora", "corpora", [row(folder) for folder in folders])
    before = PAGE.read_text()
    rows = json.loads(RESULTS.read_text())["rows"]
    after = PLACE.sub(lambda place: place[1] + "".join(f"{line}\n" for line in TABLES[place[2]](rows)), before)
    if not check:
        PAGE.write_text(after)
    elif before != after:
        print("docs/data.md differs from docs/results/corpora.json: run python scripts/corpora.py", file=sys.stderr)
    return int(check and before != after)


if __name__ == "__main__":
    sys.exit(main())
