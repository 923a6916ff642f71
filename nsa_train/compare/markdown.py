"""The report of a comparison in Markdown, from the rows of its JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import mean
from typing import Any

Row = dict[str, Any]


def markdown(result: dict[str, Any], figure: str) -> str:
    """`result` is the whole JSON; `figure` the name of the PNG beside it."""
    rows: list[Row] = result["rows"]
    of = {what: [row for row in rows if row["what"] == what] for what in KINDS}
    (head,) = of["comparison"]
    lines = [f"# Comparison of {', '.join(row['arm'] for row in of['arm'])}", "", f"**{head['reached']}**", ""]
    lines += [*_setting(head, result), "", f"![curves and differences]({figure})"]
    for heading, note, table in (
        ("Level, by the rule fixed beforehand", "", _levels(of["level"])),
        ("Gates", "", _gates(of["gate"]) if of["gate"] else ["Not run: `nsa-train compare gates`."]),
        ("Arms", "", _arms(of["arm"])),
        ("Learning rates", ABOUT_SWEEP, _sweep(of["sweep"])),
        ("Paired differences of held-out loss", ABOUT_DIFFERENCES, _differences(of["difference"])),
        ("Difference along the run", ABOUT_LEAD, _lead(of["lead"])),
        ("Loss by position, source and recall", ABOUT_CUTS, _cuts(of["arm"], of["difference"], head["baseline"])),
        ("Long context", ABOUT_EVALUATIONS, _evaluations(of["arm"], of["eval"])),
        ("Held-out loss by length of row and position", ABOUT_ROWS, _rows_by_position(of["arm"], of["eval"])),
        ("Answers by length and depth", ABOUT_GRIDS, _grids(of["grid"])),
        ("Selection on held-out text", ABOUT_SELECTION, _selection(of["arm"], of["selection"])),
        ("Selection by layer", ABOUT_LAYERS, _selection(of["arm"], _as_trained(of["selection_head"], head))),
        ("Attention maps", ABOUT_MAPS, _maps(of["maps"])),
        ("Secondary endpoints", ABOUT_SECONDARY, _secondary(of["secondary"])),
        ("Inside the models", "Means over the layers; the JSON has them layer by layer.", _layers(of["arm"])),
        ("Runs", ABOUT_RUNS, _runs(of["run"])),
    ):
        if body := list(table):
            lines += ["", f"## {heading}", *(["", note] if note else []), "", *body]
    return "\n".join(lines) + "\n"


SHARES_PAST = (0.5, 0.3)  # of the tokens, past n l' and past twice that
KINDS = (
    "comparison", "level", "gate", "arm", "sweep", "run", "eval", "grid", "selection", "selection_head", "maps",
    "difference", "lead", "secondary",
)  # fmt: skip
ABOUT_SWEEP = (
    "Held-out loss at the end of each run of the sweep; an ablation without a sweep of its own takes the rate of the "
    "arm that it ablates."
)
ABOUT_DIFFERENCES = (
    "On `text`, everything but documents of synthetic sources, which levels are about; on `all`, everything; and on "
    "the `mixture`, everything weighed by `data.mixture` over sources with held-out documents. Mean over "
    "seeds, standard error (that of the documents in brackets) and two-sided 95% interval; negative: the first arm is "
    "better. One seed has no interval: how much seeds differ is not known."
)
ABOUT_LEAD = (
    "Validation loss minus the baseline's after a share of the tokens, seed by seed: on everything that validations "
    "read, between them on a straight line; `-` where they are more than half of the run apart. No endpoint."
)
ABOUT_CUTS = (
    "Of text without synthetic sources: by position in the document as the model sees it; for tokens whose four "
    "predecessors stood together before in the document, `repeated`, by the distance back to where they did so last; "
    "`new` are all other tokens. And by source. `+` is all that lies further. ± is the standard error, with one seed, "
    "in brackets, that of the documents alone: how much seeds differ is not in it."
)
ABOUT_EVALUATIONS = (
    "Answers that are right in every token, where the facts lie in neither a forced block nor the window; in brackets "
    "nats per token of the answers, which are 2.28 where it is a guess, and the share of the facts that the "
    "chosen blocks held. `heldout` is held-out loss in rows of that length. Means over the seeds that were asked."
)

ABOUT_ROWS = (
    "Of the task `heldout`, by position in the document as the model sees it; means over the seeds that were asked. "
    "Where `samples` are few, so are the documents: what lengths and arms differ by says more than the values."
)
ABOUT_GRIDS = (
    "As in the paper's figure 5: answers that are right in every token, means over seeds. Grey cells "
    "need no selection, for what is asked lies in forced blocks or in the window."
)
ABOUT_SELECTION = (
    "Share of a full softmax over the selected branch's keys that the chosen blocks hold, the best ones as many, "
    "the forced ones with others drawn at random, and the forced ones alone; how many different blocks 2, 4 and 8 "
    "neighbouring tokens read, and how many of a token's blocks the next one reads too. Of queries at token n l' of "
    "their document and after; means over layers, KV heads and seeds."
)
ABOUT_LAYERS = (
    "The same of each layer, in each arm's longest rows that are no longer than those of training, or its shortest."
)
ABOUT_MAPS = (
    "First, middle and last layer on one held-out document, as in the paper's figure 8; of NSA a full softmax over the "
    "keys of the selected branch, and the blocks that it reads."
)
ABOUT_SECONDARY = (
    "Holm's correction is for these three, tested or not; without runs of an arm, or with one seed, there is no test."
)

ABOUT_RUNS = (
    "Tokens to copying: where the model uses the context, a document's last tokens have a lower loss than its first "
    "ones, and far lower once it has learnt to copy from it; this is when half of that rise has come, between "
    "validations on a straight line. `-`: there is hardly any, it was there from the start, or the loss ends no lower "
    "than word frequencies alone reach, the unigram entropy."
)


def _table(columns: Sequence[str], lines: Iterable[Sequence[object]]) -> list[str]:
    """Nothing where there is no line."""
    body = ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *body] if body else []


def _setting(head: Row, result: Row) -> list[str]:
    corpus = head["corpus"]
    past = ", ".join(f"{share:.0%} past {at}" for at, share in corpus["share_past"].items())
    past += "" if _long_enough(corpus["share_past"]) else " (TOO FEW: at least 50% and 30% are wanted)"
    epochs = ", ".join(f"{value:.2f} of {name}" for name, value in corpus["epochs"].items())
    labels, documents = head["heldout_labels"], head["heldout_documents"]
    before = head["steps_before"]
    rows = ", then ".join(f"{tokens:,}" for tokens in head["row_tokens"])
    trained = f", from weights that runs of {_steps(before)} had trained" if before else ""
    return [
        f"Experiment `{head['experiment']}`: {head['steps']:,} steps of {head['batch_tokens']:,} tokens in rows of "
        f"{rows}, {head['tokens']:,} tokens in all{trained}. Corpus {corpus['name']} "
        f"`{corpus['hash'][:12]}`, epochs {epochs}; tokens by position in their document: {past}. Held out: "
        f"{labels:,} labels of {documents:,} documents, unigram entropy {head['unigram_entropy']:.4f} nats. "
        f"{_endpoints(head)}",
        "",
        f"The paper's model is {head['times_smaller_than_paper']:,.0f} times larger (active parameters) and saw "
        f"{head['times_fewer_tokens_than_paper']:,.0f} times as many tokens. Other deviations: docs/comparison.md.",
        "",
        f"Trained on {', '.join(head['devices'])}; source {', '.join(map(_commit, head['commits']))}. Losses are "
        f"nats per token. Made by `{result['command']}`.",
    ]


def _endpoints(head: Row) -> str:
    """What of the held-out text levels are about."""
    if not head["synthetic_sources"]:
        return "Endpoints are over all of it: no source is synthetic."
    left_out = ", ".join(head["synthetic_sources"])
    return f"Endpoints leave out {left_out}, which is synthetic: {head['heldout_text_labels']:,} labels of text."


def _steps(before: list[int | None]) -> str:
    return " and ".join("unknown length" if steps is None else f"{steps:,} steps" for steps in before)


def _levels(ladder: list[Row]) -> Iterator[str]:
    lines = ((f"{r['name']} {r['title']}", r["rule"], _yes(r["passed"]), r["why"]) for r in ladder)
    yield from _table(("level", "rule", "passed", "found"), lines)


def _gates(gates: list[Row]) -> Iterator[str]:
    lines = (
        (f"`{r['arm']}`", r["gate"], _yes(r["passed"]), *(r[key] for key in ("found", "demanded", "device")),
         _commit(r.get("commit")))
        for r in gates
    )  # fmt: skip
    yield from _table(("arm", "gate", "passed", "found", "demanded", "device", "source"), lines)


def _evaluations(arms: list[Row], found: list[Row]) -> Iterator[str]:
    names = [arm["arm"] for arm in arms]
    asked = sorted({(row["task"], row["length"]) for row in found})
    lines = (
        (task, f"{length:,}", _questions([r for r in found if (r["task"], r["length"]) == (task, length)]), *(
            _evaluation([r for r in found if (r["arm"], r["task"], r["length"]) == (arm, task, length)])
            for arm in names
        ))
        for task, length in asked
    )  # fmt: skip
    yield from _table(("task", "tokens", "questions a run", *(f"`{arm}`" for arm in names)), lines)
    yield from _seeds(found)
    ways = {task: {str(row.get("settings")) for row in found if row["task"] == task} for task, _ in asked}
    if unlike := ", ".join(task for task, settings in ways.items() if len(settings) > 1):
        yield from ("", f"**Not all runs were asked alike**, with other samples or depths: {unlike}.")


def _seeds(found: list[Row]) -> Iterator[str]:
    """Which runs were asked: not all need be."""
    seeds: dict[str, set[int]] = {}
    for row in found:
        seeds.setdefault(row["arm"], set()).add(row["seed"])
    if seeds:
        told = "; ".join(f"`{arm}` {', '.join(map(str, sorted(of)))}" for arm, of in seeds.items())
        yield from ("", f"Seeds that were asked: {told}.")


def _questions(rows: list[Row]) -> str:
    """That count, of one run, the fewest; `heldout` asks none."""
    counted = [row["samples"] for row in rows if "accuracy" in row and row.get("samples") is not None]
    return str(min(counted)) if counted else "-"


def _evaluation(rows: list[Row]) -> str:
    counted = [row for row in rows if "loss" in row]
    if not counted:
        return "-"
    loss = mean(row["loss"] for row in counted)
    if "accuracy" not in counted[0]:
        return f"{loss:.4f}"
    held = [row["selection_recall"] for row in counted if row["selection_recall"] is not None]
    return f"{mean(row['accuracy'] for row in counted):.1%} ({loss:.2f}{f'; {mean(held):.0%}' if held else ''})"


def _rows_by_position(arms: list[Row], found: list[Row]) -> Iterator[str]:
    """A line for each arm in rows of each length: means over its seeds, by position in the document as it is seen."""
    told = [row for row in found if row.get("by_position")]
    buckets = sorted({bucket for row in told for bucket in row["by_position"]}, key=lambda b: [*map(int, b.split("-"))])
    lines = []
    for length in sorted({row["length"] for row in told}):
        for arm in arms:
            rows = [row["by_position"] for row in told if (row["arm"], row["length"]) == (arm["arm"], length)]
            by_bucket = ([row[bucket] for row in rows if row.get(bucket) is not None] for bucket in buckets)
            if rows:
                lines.append((f"{length:,}", f"`{arm['arm']}`", *(_number(mean(v) if v else None) for v in by_bucket)))
    yield from _table(("tokens of a row", "arm", *buckets), lines)


def _grids(rows: list[Row]) -> Iterator[str]:
    tasks = {row["task"]: row["figure"] for row in rows}
    yield from (f"![answers to {task}, by length and depth]({figure})" for task, figure in tasks.items())


def _as_trained(found: list[Row], head: Row) -> list[Row]:
    """Of each arm those at the longest length that training had, or else at its shortest."""
    trained, chosen = max(head["row_tokens"]), {}
    for arm in {row["arm"] for row in found}:
        lengths = sorted({row["length"] for row in found if row["arm"] == arm})
        chosen[arm] = max((length for length in lengths if length <= trained), default=lengths[0])
    return [row for row in found if row["length"] == chosen[row["arm"]]]


def _selection(arms: list[Row], found: list[Row]) -> Iterator[str]:
    """A line for each arm and length, and for each layer where rows name one."""
    places = ("arm", "length", *(key for key in ("layer",) if found and key in found[0]))
    together = list(found[0]["distinct_blocks"]) if found else []
    columns = ("arm", "tokens", *places[2:], "chosen blocks hold", "best", "random", "forced",
               *(f"read by {n}" for n in together), "next one reads")  # fmt: skip
    lines = []
    for at in dict.fromkeys(tuple(r[key] for key in places) for a in arms for r in found if r["arm"] == a["arm"]):
        rows = [row for row in found if tuple(row[key] for key in places) == at]
        held = [mean(row[share] for row in rows) for share in
                ("selection_recall", "best_recall", "random_recall", "forced_recall", "neighbour_overlap")]  # fmt: skip
        distinct = [mean(row["distinct_blocks"][n] for row in rows) for n in together]
        named = (f"`{at[0]}`", *(f"{number:,}" for number in at[1:]))
        shares = [f"{share:.1%}" for share in held]
        lines.append((*named, *shares[:-1], *(f"{n:.1f}" for n in distinct), shares[-1]))
    yield from _table(columns, lines)
    yield from _seeds(found)


def _maps(found: list[Row]) -> Iterator[str]:
    yield from (f"![attention maps of {row['arm']}, seed {row['seed']}]({row['figure']})" for row in found)


def _secondary(rows: list[Row]) -> Iterator[str]:
    lines = (
        (f"{r['arm']} - {r['baseline']}", r["cut"], "-" if r["mean"] is None else f"{r['mean']:+.4f}",
         *("not tested" if r[key] is None else f"{r[key]:.3g}" for key in ("p", "p_holm")))
        for r in rows
    )  # fmt: skip
    yield from _table(("difference", "labels", "mean", "p", "p by Holm"), lines)


def _long_enough(share_past: dict[str, float]) -> bool:
    """Whether documents are long enough: up to n l' tokens NSA selects everything, and is full attention."""
    return all(share >= wanted for share, wanted in zip(share_past.values(), SHARES_PAST, strict=False))


def _arms(arms: list[Row]) -> Iterator[str]:
    columns = ("arm", "seeds", "lr", "active parameters", "GFLOP a token", "held-out loss of text", "sd over seeds",
               "of all", "by mixture", "tokens/s", "peak GiB")  # fmt: skip
    yield from _table(columns, (
        (f"`{r['arm']}`", len(r["seeds"]), f"{r['lr']:.2e}", f"{r['params_active']:,}",
         f"{r['flops_per_token'] / 1e9:.4g}",
         _spread(r["text_loss"], "mean"), _spread(r["text_loss"], "sd"), _spread(r["loss"], "mean"),
         _spread(r["mixture_loss"], "mean"), f"{r['tokens_per_s']:,.0f}" if r["tokens_per_s"] else "-",
         f"{r['peak_gib']:.2f}")
        for r in arms
    ))  # fmt: skip
    yield ""
    keys = list(arms[0]["keys"])  # a name says what an arm is only as long as nobody sets its keys
    lines = ((f"`{r['arm']}`", *(_value(r["keys"][key]) for key in keys)) for r in arms)
    yield from _table(("arm", *(f"`{key}`" for key in keys)), lines)


def _sweep(rows: list[Row]) -> Iterator[str]:
    lines = (
        (f"`{r['arm']}`", f"`{r['swept']}`", f"{r['lr']:.2e}", ", ".join(
            f"{float(lr):.2e}: {'diverged' if loss is None else f'{loss:.4f}'}" for lr, loss in r["losses"].items()
        ))
        for r in rows
    )  # fmt: skip
    yield from _table(("arm", "swept", "chosen", "held-out loss by rate"), lines)


def _value(value: object) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value).lower()


def _differences(found: list[Row]) -> Iterator[str]:
    columns = ("difference", "labels", "seeds", "mean", "standard error", "95% interval", "by seed")
    yield from _table(columns, (
        (f"{d['arm']} - {d['baseline']}", cut, len(d["seeds"]), f"{d['mean']:+.4f}", _errors(d), _interval(d),
         ", ".join(f"{value:+.4f}" for value in d["per_seed"]))
        for cut in ("text", "all", "mixture") for d in found if d["cut"] == cut
    ))  # fmt: skip


def _lead(rows: list[Row]) -> Iterator[str]:
    lines = (
        (f"{r['arm']} - {r['baseline']}", r["seed"],
         *("-" if one is None else f"{one:+.4f}" for one in r["difference"]))
        for r in rows
    )  # fmt: skip
    shares = rows[0]["shares"] if rows else []
    yield from _table(("difference", "seed", *(f"{share:.0%} of the tokens" for share in shares)), lines)


def _cuts(arms: list[Row], differences: list[Row], baseline: str) -> Iterator[str]:
    """A line a cut: the baseline's loss, and what each arm adds to it."""
    others = [arm["arm"] for arm in arms if arm["arm"] != baseline]
    base = next(arm for arm in arms if arm["arm"] == baseline)
    by_place = {(d["arm"], d["cut"]): d for d in differences if d["baseline"] == baseline}
    lines = (
        (cut, f"{loss:.4f}", *(_with_error(by_place.get((arm, cut))) for arm in others))
        for cut, loss in base["cuts"].items()
    )
    yield from _table(("labels", f"`{baseline}`", *(f"`{arm}` - `{baseline}`" for arm in others)), lines)


def _layers(arms: list[Row]) -> Iterator[str]:
    names = list(dict.fromkeys(name for arm in arms for layer in arm["layers"] for name in _inside(layer)))
    lines = (
        (
            f"`{arm['arm']}`",
            *(_mean([_inside(layer)[name] for layer in arm["layers"] if name in _inside(layer)]) for name in names),
        )
        for arm in arms
    )
    yield from _table(("arm", *names), lines)


def _inside(layer: Row) -> dict[str, float]:
    """Statistics of a layer under the names of the table."""
    found = {f"gate {branch}": value for branch, value in layer["gates"].items()}
    found |= {name.replace("_", " "): value for name, value in layer["selection"].items()}
    found |= {"common to all tokens": layer["common"]} if "common" in layer else {}
    return found | ({"fullest expert, in mean loads": layer["load_peak"]} if "load_peak" in layer else {})


def _runs(runs: list[Row]) -> Iterator[str]:
    columns = ("run", "arm", "seed", "lr", "held-out loss of text", "of all", "by mixture",
               "tokens to the baseline's loss", "tokens to copying", "training time", "tokens/s",
               "CUDA graphs", "skipped steps", "device", "source")  # fmt: skip
    yield from _table(columns, (
        (r["name"], r["arm"], r["seed"], f"{r['lr']:.2e}",
         *(_number(r[key]) for key in ("text_loss", "loss", "mixture_loss")),
         "not reached" if r["tokens_to_baselines_loss"] is None else f"{r['tokens_to_baselines_loss']:,.0f}",
         "-" if r["tokens_to_copying"] is None else f"{r['tokens_to_copying']:,.0f}",
         *((f"{r['seconds']:,.0f} s", f"{alone:,.0f}") if (alone := r["alone_tokens_per_s"]) else ("shared",) * 2),
         "replayed" if r["cuda_graphs"] else "-",
         r["skipped_steps"], r["device"],
         _commit(r["commit"]))
        for r in runs
    ))  # fmt: skip
    for doubt in _doubts(runs):
        yield from ("", doubt)


def _doubts(runs: list[Row]) -> Iterator[str]:
    """What keeps no runs from being compared, but should be known when they are."""
    if len({run["alone_cuda_graphs"] for run in runs if run["alone_tokens_per_s"]}) > 1:
        yield "Not all runs replayed CUDA graphs: seconds and tokens/s differ by that, too."
    if shared := [run["name"] for run in runs if not run["alone_tokens_per_s"]]:
        yield f"Beside other runs on one device, so that their seconds tell nothing: {', '.join(shared)}."
    for graphs in (True, False):
        if apart := [run for run in runs if run["speed_from"] and run["alone_cuda_graphs"] is graphs]:
            how = "which replayed CUDA graphs" if graphs else "without CUDA graphs"
            named = ", ".join(run["name"] for run in apart)
            yield (
                f"Beside other runs on one device; seconds and tokens/s are those of a short run alone, {how} "
                f"({apart[0]['speed_from']}): {named}."
            )
    of_seed = {seed: {run["commit"] for run in runs if run["seed"] == seed} for seed in {run["seed"] for run in runs}}
    if mixed := [str(seed) for seed, commits in sorted(of_seed.items()) if len(commits) > 1]:
        yield f"**Runs of one seed come from different sources**: of {', '.join(mixed)}."
    if dirty := [run["name"] for run in runs if _commit(run["commit"]).endswith("-dirty")]:
        yield f"**Trained from source with changes that no commit has**: {', '.join(dirty)}."


def _commit(commit: str | None) -> str:
    return "unknown" if commit is None else commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")


def _yes(passed: bool) -> str:
    return "yes" if passed else "**no**"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _spread(loss: Row | None, key: str) -> str:
    return _number(loss[key] if loss else None)


def _mean(values: list[float]) -> str:
    return f"{mean(values):.3g}" if values else "-"


def _errors(d: Row) -> str:
    return f"{_number(d['se'])} ({_number(d['se_data'])})"


def _interval(d: Row) -> str:
    return "-" if d["low"] is None else f"{d['low']:+.4f} to {d['high']:+.4f}"


def _with_error(d: Row | None) -> str:
    if d is None:
        return "-"
    return f"{d['mean']:+.4f} " + (f"({_number(d['se_data'])})" if d["se"] is None else f"± {_number(d['se'])}")
