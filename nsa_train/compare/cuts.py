"""Held-out losses of paired runs cut by position, source and distance of what is recalled, and their differences."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from nsa_train.compare.runs import Arms, Run
from nsa_train.compare.statistics import Difference, Pair, differences
from nsa_train.config.schema import AttentionConfig
from nsa_train.data.mixture import groups_of

WHOLE, TEXT, MIXTURE = "all", "text", "mixture"
NEW, REPEATED = "new", "repeated"  # parts of text
SYNTHETIC = "recall"  # kind of the sources whose documents are made, not found
FAR_WINDOWS = 4  # far recall begins so many windows back: windows alone carry a fact there in as many layers at least


def cuts_of(run: Run) -> dict[str, np.ndarray]:
    """Losses and labels of a run's documents by cut, each [N, 2], in the order of a report.

    `text` leaves out the documents of synthetic sources, and so do its parts, positions and distances: levels are about
    what people wrote. `repeated` are tokens whose four predecessors stood together before, `new` all others. `all` is
    everything that was held out; `mixture`, there where the configuration has one, is everything, weighed source by
    source by `data.mixture`. `position 1024+` is where selection has more blocks than it may read, `recall 2048+` far
    beyond a window.
    """
    h, far = run.heldout, far_starts(run.config.attention)
    whole, sources = h.position.sum(1), h.sources.tolist()
    text = ~np.isin(h.source, [sources.index(name) for name in synthetic_sources(run)])[:, None]
    found = {WHOLE: whole, TEXT: whole * text}
    if run.config.data.mixture:
        found[MIXTURE] = whole * _as_trained(run)[:, None]
    repeated = (h.recall * text[..., None]).sum(1)
    found |= {NEW: found[TEXT] - repeated, REPEATED: repeated}
    found |= _by_bucket("position", h.position * text[..., None], h.position_edges, far["position"])
    found |= {f"source {name}": whole * (h.source == i)[:, None] for i, name in enumerate(sources)}
    return found | _by_bucket("recall", h.recall * text[..., None], h.recall_edges, far["recall"])


def far_starts(attention: AttentionConfig) -> dict[str, int]:
    """Tokens from which on a position, or the distance of what is recalled, is far."""
    return {"position": attention.selects_from, "recall": FAR_WINDOWS * attention.window}


def far_cut(kind: str, attention: AttentionConfig) -> str:
    """Name of the cut of all that is far in position or recall."""
    return f"{kind} {far_starts(attention)[kind]}+"


def synthetic_sources(run: Run) -> list[str]:
    """Held-out sources that the run's configuration calls synthetic; one that it does not name counts as text."""
    named = run.config.data.named_sources
    return [name for name in run.heldout.sources.tolist() if name in named and named[name].kind == SYNTHETIC]


def _as_trained(run: Run) -> np.ndarray:
    """[N]: by how much a document counts for its source to have its weight in data.mixture.

    A weight is over the labels that a source, or a group of sources with one weight, has here; where it has none, the
    others' weights stay in proportion.
    """
    h, weight = run.heldout, np.zeros(len(run.heldout.document))
    labels = h.position[..., 1].sum(1)
    for group in groups_of(run.config.data.mixture, h.sources.tolist()):
        mine = np.isin(h.source, group.sources)
        if labels[mine].any():
            weight[mine] = group.weight * labels.sum() / labels[mine].sum()
    return weight


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


def find(differences: Sequence[Difference], arm: str, baseline: str, cut: str = TEXT) -> Difference | None:
    wanted = (arm, baseline, cut)
    return next((d for d in differences if (d.arm, d.baseline, d.cut) == wanted), None)
