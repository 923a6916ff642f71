"""Put the figures of docs/results/ into README.md and docs/, between <!-- table: NAME --> and <!-- end -->.

python scripts/readme_tables.py           # write
python scripts/readme_tables.py --check   # exit 1 if a page says something else than the JSON
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any

from nsa_train.bench import memory
from nsa_train.bench.figures import totals
from nsa_train.bench.runs import parts_recomputed
from nsa_train.bench.training import settings_of
from nsa_train.config.load import load_config
from nsa_train.plan.advice import GIB, need

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
PAPER_WIDTHS = (192, 128)
ANSWERS = ("multikey_train", "mqar_train")
OTHERS = ("full_gated", "nsa_random", "nsa_no_slc", "window")  # that `nsa` is set beside
PLACES = ("text", "new", "repeated", "position", "recall")  # cuts of text
RUN_KEYS = ("trainer.", "data.")  # of overrides that change the run, not the model
NAMED = ("trainer.cuda_graphs=true", "trainer.force_balance=true")  # all the same


def _rows(kind: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Of each file <kind>_*.json its head and, one after another, its rows."""
    for path in sorted(RESULTS.glob(f"{kind}_*.json")):
        result = json.loads(path.read_text())
        yield from ((result, row) for row in result["rows"])


def first_run() -> str:
    """One line per machine and arm of `make train`."""
    lines = [
        "| machine | attention | held-out loss, nats per token | unigram entropy | tokens/s | whole command | commit |",
        "|---|---|---|---|---|---|---|",
    ]
    for result, row in _rows("first_run"):
        device = result["device"]
        machine = (
            f"1 x {device['name']}, bf16" if device["sm"] else f"{device['count']} cores of {device['name']}, fp32"
        )
        if "error" in row:
            lines.append(f"| {machine} | {row['attention']} | {row['error']} | | | | |")
            continue
        lines.append(
            f"| {machine} | `{row['attention']}` | {row['val_loss_first']:.2f} -> **{row['val_loss_last']:.2f}** | "
            f"{row['unigram_entropy']:.2f} | {row['tokens_per_s']:,.0f} | {row['command_s']:.0f} s | "
            f"{(result['commit'] or '-')[:7]} |"
        )
    return "\n".join(lines)


def verdicts() -> str:
    """What README's first screen says: how fast op and training are, how good the loss, and the recall."""
    T, timed = 65536, json.loads((RESULTS / "attention_h100.json").read_text())["rows"]
    ours, dense = (totals(timed, PAPER_WIDTHS, part, 1) for part in ("op", "dense"))
    best = min(by_length[T] for by_length in dense.values() if T in by_length)
    times = {indices: best / by_length[T] for (_, indices), by_length in ours.items()}
    rows = json.loads((RESULTS / "training_h100.json").read_text())["rows"]
    speed = {row["attention"]: row["tokens_per_s"] for row in rows if (row["preset"], row["T"]) == ("m", T)}
    compared = [row for row in _comparison("comparison_r1") if row["what"] == "difference" and row["cut"] == "text"]
    leads = {row["baseline"]: row for row in compared if row["arm"] == "nsa"}
    full, gated = leads["full"], leads["full_gated"]
    first = {row["arm"]: row["per_seed"][row["seeds"].index(0)] for row in compared if row["baseline"] == "full"}
    apart = {arm: f"{lead - first['full_gated']:+.3f}" for arm, lead in {"full": 0.0, **first}.items()}
    asked = [row for row in _comparison("comparison_r1_long") if row["what"] == "eval" and row["length"] == 4096]
    right = {
        (words, arm): f"{fmean(row['accuracy'] for row in asked if (row['arm'], row['task']) == (arm, task)):.0%}"
        for words, task in (("trained", ANSWERS[0]), ("held out", ANSWERS[0].removesuffix("_train")))
        for arm in ("nsa", "full")
    }
    answers = {
        "is the op faster?": f"forward + backward of one document of 64k on an H100: {times['local']:.1f} times "
        f"(neighbours choose alike) and {times['random']:.1f} times (every query anew) as fast as the best dense "
        "kernel; packs of short documents: no",
        "is training faster?": "2.3B parameters, rows of 64k, one H100: "
        f"{speed['nsa'] / speed['full']:.1f} times the tokens/s",
        "is the loss as good?": f"77M parameters, 0.2B tokens, {len(full['seeds'])} seeds: {full['mean']:+.3f} nats "
        f"against full attention ({full['low']:+.3f} to {full['high']:+.3f}; one-sided 95% bound {full['upper']:+.3f})"
        f", {gated['mean']:+.3f} ({gated['low']:+.3f} to {gated['high']:+.3f}) against full attention with a gate",
        "what brings it?": "loss of seed 0 above that of full attention with a gate: without one "
        f"{apart['full']}, a gated window {apart['window']}, with compressed blocks {apart['nsa_no_slc']}, with blocks "
        f"drawn at random as well {apart['nsa_random']}, with chosen ones instead (NSA) {apart['nsa']}",
        "does it recall over long context?": f"not at this size: `{ANSWERS[0].removesuffix('_train')}` at 4k after a "
        f"stage of recall, in words of training: {right['trained', 'nsa']} right (copying any value gives 3%), full "
        f"attention {right['trained', 'full']}; in held-out words {right['held out', 'nsa']} and "
        f"{right['held out', 'full']}",
    }
    return "\n".join(["| question | measured |", "|---|---|", *(f"| {q} | {a} |" for q, a in answers.items())])


def attention(trained: bool = False) -> str:
    """Forward + backward of the op at the paper's widths beside the fastest dense kernel; the JSON has the others.

    On made-up blocks, or beside them on those that a model chose.
    """
    lines = ["| GPU | heads, widths | documents | blocks | T | NSA ms | dense ms (kernel) | times faster | peak GiB |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for path in sorted(RESULTS.glob("attention_*.json")):
        if path.stem.endswith("_trained") is not trained:
            continue
        result = json.loads(path.read_text())
        ops = [row for row in result["rows"] if row["part"] == "op" and (row.get("pass") == "fwd" or "error" in row)]
        ops = [row for row in ops if (row["d_qk"], row["d_v"]) == PAPER_WIDTHS]
        for op in sorted(ops, key=lambda row: (row["docs"] > 1 and not trained, row["indices"], row["T"])):
            lines.append(attention_line(result, op))
    return "\n".join(lines)


def attention_line(result: dict[str, Any], op: dict[str, Any]) -> str:
    start = (
        f"| {result['device']['name']} | {op['Hq']}/{op['Hk']}, {op['d_qk']}/{op['d_v']} | {op['docs']} | "
        f"{op['indices']} | {op['T'] // 1024}k | "
    )
    if "error" in op:
        return f"{start}{op['error']} | | | |"
    ours, full = (totals(result["rows"], PAPER_WIDTHS, part, op["docs"]) for part in ("op", "dense"))
    ms = ours[op["impl"], op["indices"]][op["T"]]
    dense = {impl: by_length[op["T"]] for (impl, _), by_length in full.items() if op["T"] in by_length}
    best = min(dense, key=lambda impl: dense[impl], default=None)
    beside = f"{dense[best]:.1f} ({best}) | {dense[best] / ms:.2f}" if best else "- | -"
    return f"{start}{ms:.2f} | {beside} | {op['peak_gib']:.1f} |"


def memory_plan() -> str:
    """The plan's memory beside what a GPU saw, all machines in one table."""
    return memory.markdown([(result["device"]["name"], row) for result, row in _rows("memory")])


def training() -> str:
    """Speed, share of the peak and memory of the training benchmark's runs."""
    lines = [
        "| GPUs | preset | attention | T | text, past T/2 | tokens a pass | recomputed | tokens/s | MFU, executed "
        "| MFU, as if full | peak GiB | planned GiB | commit |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result, row in _rows("training"):
        again = ", ".join(parts_recomputed(row)) or "no"
        planned = need(load_config(settings_of(row)), row["gpus"]).total / GIB
        named = [word for word in row["overrides"] if word in NAMED or not word.startswith(RUN_KEYS)]
        words = [row["preset"], *named]
        model = " ".join(f"`{word}`" for word in words)
        arm = " ".join([f"`{row['attention']}`", *row.get("dense_kernels", [])])
        text = f"{row['corpus']}, {row['past_half']:.0%}" if "corpus" in row else "-"
        start = (
            f"| {row['gpus']} x {result['device']['name']} | {model} | {arm} | "
            f"{row['T'] // 1024}k | {text} | {row['T'] * row['micro_batch'] // 1024}k | {again} | "
        )
        if "error" in row:
            lines.append(f"{start}failed | | | | {planned:.1f} | {row['commit'][:7]} |")
            continue
        lines.append(
            f"{start}{row['tokens_per_s']:,.0f} | {row['mfu_executed']:.1%} | {row['mfu_dense']:.1%} | "
            f"{row['peak_gib']:.1f} | {planned:.1f} | {row['commit'][:7]} |"
        )
    return "\n".join(lines)


def layers() -> str:
    """Milliseconds of a forward and backward pass of the small parts of a layer."""
    lines = [
        "| GPU | preset | T | part | implementation | ms | peak GiB | relative error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result, row in _rows("layers"):
        place = f"{result['device']['name']} | `{row['preset']}` | {row['T'] // 1024}k"
        start = f"| {place} | {row['part']} | {row['impl']} | "
        if "error" in row:
            lines.append(f"{start}failed | | |")
            continue
        lines.append(f"{start}{row['ms']:.3f} | {row['peak_gib']:.2f} | {row['rel_err']:.1e} |")
    return "\n".join(lines)


def moe() -> str:
    """Milliseconds of a forward and backward pass of the MoE layers."""
    lines = ["| GPU | layer | load of the experts | ms | peak GiB | relative error |", "|---|---|---|---|---|---|"]
    for result, row in _rows("moe"):
        start = f"| {result['device']['name']} | {row['impl']} | {row['load']} | "
        if "error" in row:
            lines.append(f"{start}failed | | |")
            continue
        lines.append(f"{start}{row['ms']:.1f} | {row['peak_gib']:.1f} | {row['rel_err']:.1e} |")
    return "\n".join(lines)


def comparison() -> str:
    """Held-out loss of text by seed and arm: of `r1`, its long stage, and its earlier runs in larger steps."""
    now, long, before = (
        _comparison(name) for name in ("comparison_r1", "comparison_r1_long", "steps_131k/comparison_r1")
    )
    lines = [
        "| arm | rows of 8k, by seed | mean | copies after, M tokens | long stage, rows of 32k | in steps of 131k |",
        "|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in (*now, *before) if row["what"] == "run"):
        losses = [_by_seed(rows, arm, lambda run: f"{run['text_loss']:.3f}") for rows in (now, long, before)]
        copies = _by_seed(now, arm, lambda run: _millions(run["tokens_to_copying"]))
        mine = [row for row in now if row["what"] == "arm" and row["arm"] == arm and len(row["seeds"]) > 1]
        mean = f"{mine[0]['text_loss']['mean']:.3f}" if mine else ""
        lines.append(f"| `{arm}` | {losses[0]} | {mean} | {copies} | {losses[1]} | {losses[2]} |")
    return "\n".join(lines)


def answers() -> str:
    """Right answers after the long stage by task, arm and length, means over its seeds."""
    asked = [row for row in _comparison("comparison_r1_long") if row["what"] == "eval" and "accuracy" in row]
    rows = [row for row in asked if row["task"] in ANSWERS]
    lengths = sorted({row["length"] for row in rows})
    lines = [
        f"| task | arm | seeds | {' | '.join(f'{n // 1024}k' for n in lengths)} |",
        "|---|---|---|" + "---|" * len(lengths),
    ]
    for task, arm in dict.fromkeys((task, row["arm"]) for task in ANSWERS for row in rows):
        mine = [row for row in rows if (row["task"], row["arm"]) == (task, arm)]
        seeds = ", ".join(map(str, sorted({row["seed"] for row in mine})))
        right = ([row["accuracy"] for row in mine if row["length"] == n] for n in lengths)
        told = " | ".join(f"{fmean(shares):.1%}" if shares else "-" for shares in right)
        lines.append(f"| `{task}` | `{arm}` | {seeds} | {told} |")
    return "\n".join(lines)


def copying() -> str:
    """When the runs of `r1` learnt to copy, the earliest first, and how much earlier than in larger steps."""
    now, before = _comparison("comparison_r1"), _comparison("steps_131k/comparison_r1")
    then = {(row["arm"], row["seed"]): row["tokens_to_copying"] for row in before if row["what"] == "run"}
    runs = sorted((row for row in now if row["what"] == "run"), key=lambda run: run["tokens_to_copying"] or inf)
    lines = [
        "| arm | seed | copies after | earlier than in steps of 131k by | held-out loss of text |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        after, earlier = run["tokens_to_copying"], then.get((run["arm"], run["seed"]))
        where = f"{_millions(after)}M tokens, step {after / now[0]['batch_tokens']:,.0f}" if after else "-"
        gain = f"{_millions(earlier - after)}M" if earlier and after else ""
        lines.append(f"| `{run['arm']}` | {run['seed']} | {where} | {gain} | {run['text_loss']:.3f} |")
    return "\n".join(lines)


def _millions(tokens: float | None) -> str:
    return "-" if tokens is None else f"{tokens / 1e6:.0f}"


def places() -> str:
    """Where `nsa` differs from a gated baseline and from its ablations: by position, and by what repeats."""
    rows = [row for row in _comparison("comparison_r1") if row["what"] == "difference" and row["arm"] == "nsa"]
    cuts = [cut for cut in dict.fromkeys(row["cut"] for row in rows) if cut.startswith(PLACES)]
    found = [{row["cut"]: row for row in rows if row["baseline"] == other} for other in OTHERS]
    heads = (f"`nsa` - `{one['text']['baseline']}`, {_seeds(one['text']['seeds'])}" for one in found)
    lines = [f"| labels | {' | '.join(heads)} |", "|---" * (1 + len(found)) + "|"]
    for cut in (cut for cut in cuts if not cut.endswith("+")):
        lines.append(f"| {cut} | {' | '.join(_difference(one[cut]) for one in found)} |")
    return "\n".join(lines)


def _seeds(seeds: list[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def _difference(row: dict[str, Any]) -> str:
    """With its interval over seeds, of one seed with the error of the documents."""
    about = f"{row['se_data']:.3f}" if row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}"
    return f"{row['mean']:+.3f} ({about})".replace("-0.000", "0.000")


def _comparison(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def _by_seed(rows: list[dict[str, Any]], arm: str, tell: Callable[[dict[str, Any]], str]) -> str:
    """What there is of each seed from 0 on, `-` where there is none."""
    runs = {row["seed"]: tell(row) for row in rows if row["what"] == "run" and row["arm"] == arm}
    return ", ".join(runs.get(seed, "-") for seed in range(max(runs, default=-1) + 1))


def faults() -> str:
    """How many tests turned red for each fault that was planted in a kernel."""
    lines = ["| file | fault | tests red |", "|---|---|---|"]
    for row in json.loads((RESULTS / "planted_faults.json").read_text())["rows"]:
        if (ROOT / "nsa_train" / "ops" / f"{row['file']}.py").exists():
            red = {test.partition("[")[0] for test in row["red"]}
            lines.append(f"| `{row['file']}` | {row['fault']} | {len(red)} |")
    return "\n".join(lines)


PAGES = {
    "README.md": {
        "verdicts": verdicts,
        "first_run": first_run,
        "attention": attention,
        "comparison": comparison,
        "answers": answers,
    },
    "docs/design.md": {"copying": copying, "places": places},
    "docs/kernels.md": {"trained": partial(attention, trained=True), "faults": faults},
    "docs/performance.md": {"memory": memory_plan, "training": training, "layers": layers, "moe": moe},
}


def filled(page: str, text: str) -> str:
    for name, table in PAGES[page].items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        pattern = re.escape(start) + ".*?" + re.escape(end)
        text, found = re.subn(pattern, (start + table() + "\n" + end).replace("\\", r"\\"), text, flags=re.DOTALL)
        if not found:
            raise SystemExit(f"{page} has no place for the table {name}")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check, code = parser.parse_args().check, 0
    for page in PAGES:
        before = (ROOT / page).read_text()
        after = filled(page, before)
        if not check:
            (ROOT / page).write_text(after)
        elif before != after:
            print(f"{page} differs from docs/results/: run python scripts/readme_tables.py", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
