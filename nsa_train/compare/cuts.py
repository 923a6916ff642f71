"""Held-out losses of paired runs cut by position, source and distance of what is recalled, and their differences."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from nsa_train.compare.runs import Arms, Run
from nsa_train.compare.statistics import Difference, Pair, differences

WHOLE = "all"
FAR_WINDOWS = 4  # far recall begins so many windows back: windows alone carry a fact there in as many layers at least


def cuts_of(run: Run) -> dict[str, np.ndarray]:
    """Losses and labels of a run's documents by cut, each [N, 2], in the order of a report.

    `position 1024+` is where selection has more blocks than it may read, `recall 2048+` far beyond a window.
    """
    h, a = run.heldout, run.config.attention
    found = {WHOLE: h.position.sum(1)}
    found |= _by_bucket("position", h.position, h.position_edges, a.slc_count * a.slc_block)
    found |= {
        f"source {name}": h.position.sum(1) * (h.source == i)[:, None] for i, name in enumerate(h.sources.tolist())
    }
    return found | _by_bucket("recall", h.recall, h.recall_edges, FAR_WINDOWS * a.window)


def _by_bucket(kind: str, sums: np.ndarray, edges: np.ndarray, far: int) -> dict[str, np.ndarray]:
    """One cut per bucket, and one of all buckets that begin at `far` or later."""
    found = {f"{kind} {a}-{b}": sums[:, i] for i, (a, b) in enumerate(pairwise(edges.tolist()))}
    return found | {f"{kind} {far}+": sums[:, edges[:-1] >= far].sum(1)}


def losses_of(run: Run) -> dict[str, float]:
    """Loss of a run in each cut that has labels, nats per token."""
    sums = {cut: pairs.sum(0).tolist() for cut, pairs in cuts_of(run).items()}
    return {cut: loss / labels for cut, (loss, labels) in sums.items() if labels}


def paired_differences(arms: Arms) -> list[Difference]:
    """Of each pair of `arms.pairs` in every cut, over the seeds that both have."""
    tables = {id(run): cuts_of(run) for run in arms.all}
    documents = sorted({int(d) for run in arms.all for d in run.heldout.document})
    place = {document: row for row, document in enumerate(documents)}
    cuts = list(next(iter(tables.values())))

    def table(run: Run, column: int) -> np.ndarray:
        """[documents, cuts]: seeds may have read other documents, which count nothing here."""
        whole = np.zeros((len(documents), len(cuts)))
        rows = [place[int(d)] for d in run.heldout.document]
        whole[rows] = np.stack([tables[id(run)][cut][:, column] for cut in cuts], 1)
        return whole

    pairs = []
    for arm, baseline in arms.pairs:
        ours, theirs = arms.by_seed(arm), arms.by_seed(baseline)
        seeds = [seed for seed in ours if seed in theirs]
        losses = {seed: (table(ours[seed], 0), table(theirs[seed], 0)) for seed in seeds}
        if seeds:
            pairs.append(Pair(arm, baseline, losses, {seed: table(ours[seed], 1) for seed in seeds}))
    return differences(pairs, cuts, len(documents))


def find(differences: Sequence[Difference], arm: str, baseline: str, cut: str = WHOLE) -> Difference | None:
    wanted = (arm, baseline, cut)
    return next((d for d in differences if (d.arm, d.baseline, d.cut) == wanted), None)
