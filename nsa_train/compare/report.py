"""What a comparison found, as the rows of its JSON: every figure of the report and of its plots is in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from statistics import mean
from typing import Any

import numpy as np

from nsa_train.compare.cuts import MIXTURE, TEXT, WHOLE, cuts_of, losses_of, paired_differences, synthetic_sources
from nsa_train.compare.levels import Level, levels, reached, secondary
from nsa_train.compare.runs import ARM_KEYS, Arms, Run
from nsa_train.compare.speeds import Speeds
from nsa_train.compare.statistics import spread
from nsa_train.data.stages import stages_of
from nsa_train.errors import RunFolderError
from nsa_train.train.answers import settings_of

OF_BLOCKS = (
    "selection_recall", "best_recall", "random_recall", "forced_recall", "distinct_blocks", "neighbour_overlap"
)  # fmt: skip
# What a row of `nsa-train eval` is called in the report, and what the report takes from it.
EVALUATED = {
    "summary": ("eval", ("task", "length", "rope_factor", "accuracy", "low", "high", "loss", "selection_recall",
                         "samples", "cells", "by_position", "settings")),
    "selection": ("selection", ("length", "rope_factor", "queries", *OF_BLOCKS, "distance")),
    "head": ("selection_head", ("length", "layer", "kv_head", *OF_BLOCKS)),
}  # fmt: skip
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the tokens, at which differences along the run are told
APART = 0.5  # of the tokens: validations further apart say nothing of what lies between
LEAST_RISE = 0.1  # nats per token: what learning to copy adds to the use of the context, at least
PAPER_ACTIVE, PAPER_TOKENS = 4.5e9, 270e9  # section 4.1: 27B parameters, 270B tokens of 8k texts


def rows_of(arms: Arms, gates: Sequence[dict[str, Any]], speeds: Speeds | None = None) -> list[dict[str, Any]]:
    """One row a fact; `what` is comparison, level, gate, arm, run, eval, selection, selection_head, difference, lead or
    secondary.

    Those of grids, maps and a sweep come beside them: see `command`. Runs that go on from others reach no level and
    have no endpoint: these are about the end of pretraining.

    speeds  measured apart, of arms whose runs were not alone on their device
    """
    differences = paired_differences(arms)
    run_rows = {arm: [_run_row(run, arms, speeds) for run in runs] for arm, runs in arms.runs.items()}
    first = arms.all[0]
    stage = bool(first.steps_before)
    ladder = [] if stage else levels(differences, list(arms.runs), gates)
    endpoints = [] if stage else secondary(differences, first.config.attention)
    return [
        {"what": "comparison", **_reached(reached(ladder), stage), **_setting(arms)},
        *({"what": "level", **one._asdict()} for one in ladder),
        *({**gate, "what": "gate"} for gate in gates),
        *(_arm_row(runs, run_rows[arm]) for arm, runs in arms.runs.items()),
        *(row for rows in run_rows.values() for row in rows),
        *(_eval_row(run, row) for run in arms.all for row in _answers(run) if row["what"] in EVALUATED),
        *({"what": "difference", **dataclasses.asdict(d)} for d in differences),
        *(_lead_row(run, arms) for run in arms.all if run.arm != arms.baseline),
        *({"what": "secondary", **one._asdict()} for one in endpoints),
    ]


def _reached(level: Level | None, stage: bool) -> dict[str, Any]:
    """The level, and how report and figure call it; a stage goes on from other runs."""
    said = f"level {level.name}: {level.title}" if level else "no level reached"
    if stage:
        said = "a stage that goes on from other runs, which are what levels are about"
    return {"level": level and level.name, "title": level and level.title, "reached": said}


def _setting(arms: Arms) -> dict[str, Any]:
    """What all runs share, and how far it is from the paper."""
    run = arms.all[0]
    trainer, heldout = run.config.trainer, run.heldout
    return {
        "experiment": run.config.experiment, "baseline": arms.baseline, "corpus": run.corpus,
        "unigram_entropy": run.summary["unigram_entropy"], "steps": trainer.steps,
        "row_tokens": [stage.seq_len for stage in stages_of(run.config)],
        "batch_tokens": trainer.seq_len * trainer.batch_rows, "tokens": run.summary["tokens"],
        "steps_before": run.steps_before,
        "heldout_documents": len(heldout.document), "heldout_labels": int(heldout.position[..., 1].sum()),
        "heldout_text_labels": int(cuts_of(run)[TEXT][:, 1].sum()), "synthetic_sources": synthetic_sources(run),
        "times_smaller_than_paper": PAPER_ACTIVE / run.summary["params_active"],
        "times_fewer_tokens_than_paper": PAPER_TOKENS / run.summary["tokens"],
        "devices": sorted({f"{r.manifest['world_size']} x {r.manifest['device']}" for r in arms.all}),
        "commits": sorted({r.manifest["commit"] for r in arms.all}, key=str),
    }  # fmt: skip


def _run_row(run: Run, arms: Arms, speeds: Speeds | None) -> dict[str, Any]:
    """Seconds are the run's own or, where others shared its device and its speed alone was measured, by that."""
    partner = arms.by_seed(arms.baseline)[run.seed]
    trained, losses = run.of("train"), losses_of(run)
    apart = speeds.of(run) if speeds else None
    alone = None if run.runs_a_device > 1 else run.tokens_per_s

    def seconds(tokens: int) -> float:
        return tokens / apart.tokens_per_s if apart else run.seconds(tokens)

    return {
        "what": "run", "name": run.config.name, "arm": run.arm, "seed": run.seed, "lr": run.config.optim.lr,
        "loss": run.loss, "text_loss": losses.get(TEXT), "mixture_loss": losses.get(MIXTURE),
        "tokens_per_s": run.tokens_per_s, "peak_gib": max(row["mem_gib"] for row in trained),
        "alone_tokens_per_s": apart.tokens_per_s if apart else alone,
        "alone_cuda_graphs": apart.cuda_graphs if apart else run.in_graphs,
        "speed_from": speeds.path.name if apart and speeds else None,
        "seconds": seconds(run.summary["tokens"]), "flops": run.flops(run.summary["tokens"]),
        "skipped_steps": run.summary["skipped_steps"], "device": run.manifest["device"], "cuda_graphs": run.in_graphs,
        "world_size": run.manifest["world_size"], "runs_a_device": run.runs_a_device, "commit": run.manifest["commit"],
        "versions": run.manifest["versions"], "tokens_to_baselines_loss": _tokens_to(run.curve, partner.curve[-1][1]),
        "tokens_to_copying": tokens_to_copying(run),
        "val": [
            {"tokens": tokens, "flops": run.flops(tokens), "seconds": seconds(tokens), "loss": loss}
            for tokens, loss in run.curve
        ],
    }  # fmt: skip


def _answers(run: Run) -> list[dict[str, Any]]:
    """Rows of `nsa-train eval`, without those of before they named the corpus: quizzes had another form then, and
    `heldout` other labels at every length."""
    settings = settings_of(run.evaluations)
    return [
        row for row in run.evaluations
        if row["what"] not in ("summary", "cell") or "corpus_hash" in settings.get(row["task"], ())
    ]  # fmt: skip


def _eval_row(run: Run, row: dict[str, Any]) -> dict[str, Any]:
    what, keys = EVALUATED[row["what"]]
    needed = {"selection": OF_BLOCKS, "head": (*OF_BLOCKS, "layer")}.get(row["what"], ())
    if lacking := [key for key in needed if key not in row]:
        raise RunFolderError(
            f"{run.path}: answers to task=blocks lack {', '.join(lacking)}; ask `nsa-train eval` again"
        )
    return {"what": what, "arm": run.arm, "seed": run.seed, **{key: row[key] for key in keys if key in row}}


def grid_rows(arms: Arms, figures: str) -> list[dict[str, Any]]:
    """Answers of each arm by length and depth, task by task: means over its seeds, drawn in <figures>_<task>.png."""
    found: dict[tuple[str, str], dict[tuple[int, float], list[dict[str, Any]]]] = {}
    for run in arms.all:
        for row in _answers(run):
            if row["what"] == "cell":
                cells = found.setdefault((row["task"], run.arm), {})
                cells.setdefault((row["length"], row["depth"]), []).append(row)
    return [
        {"what": "grid", "task": task, "arm": arm, "figure": f"{figures}_{task}.png",
         "cells": [_mean_cell(rows) for _, rows in sorted(cells.items())]}
        for (task, arm), cells in sorted(found.items(), key=lambda item: item[0][0])
    ]  # fmt: skip


def _mean_cell(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the seeds whose questions there need selection, or, where none does, of all."""
    counted = [row for row in rows if not row["zone"]]
    return {
        "length": rows[0]["length"], "depth": rows[0]["depth"], "zone": None if counted else rows[0]["zone"],
        "accuracy": mean(row["accuracy"] for row in counted or rows),
    }  # fmt: skip


def _tokens_to(curve: Iterable[tuple[int, float]], low: float) -> float | None:
    """Tokens after which (tokens, value) of validations first was as low, between them on a straight line."""
    before: tuple[int, float] | None = None
    for tokens, value in curve:
        if value <= low:
            return float(np.interp(-low, [-before[1], -value], [before[0], tokens])) if before else float(tokens)
        before = tokens, value
    return None


def tokens_to_copying(run: Run) -> float | None:
    """Tokens after which the model uses its context half as much as it does at the end; between validations on a line.

    How much it uses it is the loss of a document's first tokens minus that of its last ones, which stays low until the
    model learns to copy what stood before in the document (the in-context learning score of Olsson et al.,
    arXiv 2209.11895) and then rises in a small part of the run. The rise is counted from the lowest value. None where
    it is less than LEAST_RISE, half of it was there from the start, as in a run that goes on from another, or the
    model ends no better than word frequencies alone: what changes in such a one is no copying.
    """
    if run.config.init_from or run.curve[-1][1] >= run.summary["unigram_entropy"]:
        return None
    told = [row["by_position"] for row in run.of("val")]
    shared = [bucket for bucket in told[0] if all(losses.get(bucket) is not None for losses in told)]
    if len(shared) < 2:
        return None
    first, last = shared[0], shared[-1]
    unused = [(row["tokens"], row["by_position"][last] - row["by_position"][first]) for row in run.of("val")]
    least_use = max(range(len(unused)), key=lambda at: unused[at][1])
    half = (unused[least_use][1] + unused[-1][1]) / 2
    if unused[least_use][1] - unused[-1][1] < LEAST_RISE or unused[0][1] <= half:
        return None
    return _tokens_to(unused[least_use:], half)


def _lead_row(run: Run, arms: Arms) -> dict[str, Any]:
    """Validation loss minus that of the baseline's run after shares of the tokens.

    Between validations on a straight line; None where these are more than APART of the tokens apart.
    """
    pair, tokens = (run, arms.by_seed(arms.baseline)[run.seed]), run.summary["tokens"]
    at, there = [share * tokens for share in SHARES], [place for place, _ in run.curve]
    ours, theirs = (np.interp(at, *np.transpose(one.curve)) for one in pair)
    apart = [min(p for p in there if p >= place) - max(p for p in there if p <= place) for place in at]
    told = [float(d) if gap <= APART * tokens else None for d, gap in zip(ours - theirs, apart, strict=True)]
    return {
        "what": "lead", "arm": run.arm, "baseline": arms.baseline, "seed": run.seed, "shares": list(SHARES),
        "difference": told,
    }  # fmt: skip


def _arm_row(runs: Sequence[Run], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the arm's seeds, of which `rows` are."""
    speeds = [speed for row in rows if (speed := row["alone_tokens_per_s"])]
    first, cuts = runs[0], [losses_of(run) for run in runs]
    common = [cut for cut in cuts[0] if all(cut in one for one in cuts)]
    return {
        "what": "arm", "arm": first.arm, "seeds": [run.seed for run in runs], "lr": first.config.optim.lr,
        "keys": {key: getattr(getattr(first.config, key.split(".")[0]), key.split(".")[1]) for key in ARM_KEYS},
        "params_total": first.summary["params_total"], "params_active": first.summary["params_active"],
        "flops_per_token": first.flops(first.summary["tokens"]) / first.summary["tokens"],
        "loss": spread([run.loss for run in runs]),
        "text_loss": spread([one[TEXT] for one in cuts]) if TEXT in common else None,
        "mixture_loss": spread([one[MIXTURE] for one in cuts]) if MIXTURE in common else None,
        "tokens_per_s": mean(speeds) if speeds else None,
        "peak_gib": max(row["mem_gib"] for run in runs for row in run.of("train")),
        "cuts": {cut: mean(one[cut] for one in cuts) for cut in common if cut != WHOLE},
        "layers": list(_layers(runs)),
    }  # fmt: skip


def _layers(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """What the last validation saw in each layer, and the load of its fullest expert in the last quarter."""
    probes = [run.of("val")[-1]["layers"] for run in runs]
    dense = runs[0].config.model.dense_layers
    for layer in range(len(probes[0])):
        found: dict[str, Any] = {
            kind: {name: mean(one[layer][kind][name] for one in probes) for name in probes[0][layer].get(kind, {})}
            for kind in ("gates", "selection")
        }
        if all("common" in one[layer] for one in probes):  # runs of before it was measured have none
            found["common"] = mean(one[layer]["common"] for one in probes)
        if layer >= dense:
            late = [run.of("train")[-max(1, len(run.of("train")) // 4) :] for run in runs]
            found["load_peak"] = mean(row["load_peak"][layer - dense] for some in late for row in some)
        yield found
