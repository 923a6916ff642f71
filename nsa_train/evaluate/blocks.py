"""Which blocks a model selects on held-out text, how neighbours share them, and how much attention they hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsa_train.bench.figures import save_figure
from nsa_train.bench.trained import TrainedBlocks
from nsa_train.data.loader import Batch
from nsa_train.model.attention import Attended
from nsa_train.model.transformer import Transformer
from nsa_train.ops import statistics
from nsa_train.ops.nsa import NSASpec

TOGETHER = (2, 4, 8)  # neighbouring tokens whose blocks are counted together
KEPT_ROWS, KEPT_TOKENS = 4, 2**16  # what is kept of the chosen blocks at most, one row at least
RECALLS = ("selection_recall", "best_recall", "random_recall", "forced_recall")  # in the order of `statistics.Held`
Row = dict[str, Any]


class Counts:
    """Sums over the queries that choose, by layer and KV head: those at token n l' of their document and after.

    The first one counted is at a multiple of the largest of TOGETHER, so that groups lie as tiles of a kernel would.

    sums  [layers, facts, Hk] float64: the four of `Held`, distinct blocks for each of TOGETHER, blocks that the next
          query reads too, and free blocks by distance in bins that double
    """

    def __init__(self, layers: int, kv_heads: int, longest: int, spec: NSASpec, device: torch.device) -> None:
        self.spec = spec
        self.first = -(-spec.slc_count * spec.slc_block // TOGETHER[-1]) * TOGETHER[-1]
        self.bins = [2**i for i in range(((longest - 1) // spec.slc_block).bit_length())]  # from so many blocks on
        facts = len(RECALLS) + len(TOGETHER) + 1 + len(self.bins)
        self.sums = torch.zeros(layers, facts, kv_heads, dtype=torch.float64, device=device)
        self.tokens = self.documents = self.queries = self.pairs = 0
        self.forced = self.read = 0  # of blocks, by all queries
        self.groups = [0 for _ in TOGETHER]
        self.drawn = torch.zeros(len(self.bins), dtype=torch.float64)  # free blocks by distance, all equally likely

    @property
    def free(self) -> int:
        return self.spec.slc_count - self.spec.slc_init - self.spec.slc_local

    def add_document(self, length: int) -> None:
        """What depends on its length alone."""
        spec, queries = self.spec, max(0, length - self.first)
        own = torch.arange(length) // spec.slc_block
        self.tokens += length
        self.read += int((own + 1).clamp(max=spec.slc_count).sum())
        self.forced += int((own + 1).clamp(max=spec.slc_init + spec.slc_local).sum())
        self.documents += queries > 0
        self.queries += queries
        self.pairs += max(0, queries - 1)
        self.groups = [count + queries // n for count, n in zip(self.groups, TOGETHER, strict=True)]
        nearest, furthest = spec.slc_local, own[self.first :] - spec.slc_init
        for i, low in enumerate(self.bins):
            there = (furthest.clamp(max=2 * low - 1) - max(low, nearest) + 1).clamp(min=0)
            self.drawn[i] += float((self.free * there / (furthest - nearest + 1)).sum())

    def add_layer(self, layer: int, attended: Attended) -> None:
        """Of one document."""
        q, k, blocks = attended
        assert blocks is not None
        if len(q) <= self.first:
            return
        chosen, distance = blocks[self.first :], statistics.free_distances(blocks, self.first, self.spec)
        self.sums[layer] += torch.stack([
            *statistics.attention_held(q, k, blocks, self.first, self.spec),
            *(statistics.distinct_blocks(chosen, n).sum(0) for n in TOGETHER),
            statistics.read_by_next(chosen).sum(0),
            *(((distance >= low) & (distance < 2 * low)).sum((0, 2)) for low in self.bins),
        ])  # fmt: skip

    def rows(self) -> Iterator[Row]:
        """The means over layers and KV heads, then a row for each of them; some query must have chosen."""
        counts = [self.queries] * len(RECALLS) + self.groups + [self.pairs * self.spec.slc_count]
        counts += [self.queries * self.free] * len(self.bins)
        found = self.sums.cpu() / torch.tensor(counts).clamp(min=1)[:, None]
        facts = {
            "tokens": self.tokens, "documents": self.documents, "queries": self.queries,
            "forced_share": self.forced / self.read,
        }  # fmt: skip
        drawn = self._by_distance((self.drawn / max(1, self.queries * self.free)).tolist())
        yield {"what": "selection", **facts, **self._row(found.mean((0, 2))), "distance_random": drawn}
        for layer, of_layer in enumerate(found):
            for head, values in enumerate(of_layer.T):
                yield {"what": "head", "layer": layer, "kv_head": head, **self._row(values)}

    def _row(self, values: Tensor) -> Row:
        recalls, distinct, (overlap,), distance = values.split([len(RECALLS), len(TOGETHER), 1, len(self.bins)])
        return {
            **dict(zip(RECALLS, recalls.tolist(), strict=True)),
            "distinct_blocks": dict(zip(map(str, TOGETHER), distinct.tolist(), strict=True)),
            "neighbour_overlap": float(overlap), "distance": self._by_distance(distance.tolist()),
        }  # fmt: skip

    def _by_distance(self, shares: Sequence[float]) -> dict[str, float]:
        """Under the tokens from the query's block back to the one it chose."""
        block = self.spec.slc_block
        return {f"{low * block}-{2 * low * block}": share for low, share in zip(self.bins, shares, strict=True)}


@torch.no_grad()
def count_blocks(
    model: Transformer, batches: Iterable[Batch], length: int, spec: NSASpec
) -> tuple[Counts, TrainedBlocks]:
    """Over batches of one row of `length` tokens each, and the blocks that the first ones chose."""
    device, layers = model.embed.weight.device, len(model.layers)
    counts = Counts(layers, model.config.kv_heads, length, spec, device)
    rows: list[np.ndarray] = []
    lengths: list[int] = []
    for batch in batches:
        documents: list[slice] = list(batch.document_spans())
        kept: list[Tensor] = []
        for document in documents:
            counts.add_document(document.stop - document.start)
        model.watch(partial(_count_layer, counts, documents, kept))
        model.hidden(batch.tokens.to(device), batch.packing.to(device))
        if len(rows) < max(1, min(KEPT_ROWS, KEPT_TOKENS // length)):
            rows.append(torch.stack(kept).cpu().numpy())
            lengths += batch.packing.lengths
    model.watch(None)
    kind = np.int16 if length // spec.slc_block < 2**15 else np.int32
    blocks = np.concatenate(rows, 1).astype(kind)
    bounds = np.cumsum([0, *lengths]).astype(np.int32)
    return counts, TrainedBlocks(blocks, bounds, np.arange(layers, dtype=np.int32), spec)


def _count_layer(counts: Counts, documents: list[slice], kept: list[Tensor], layer: int, attended: Attended) -> None:
    q, k, blocks = attended
    assert blocks is not None
    for document in documents:
        counts.add_layer(layer, Attended(q[document], k[document], blocks[document]))
    kept.append(blocks)


def plot_blocks(rows: Sequence[Row], title: str, path: Path) -> None:
    """Of one length. Left: recall by layer. Middle: distinct blocks of neighbours. Right: distance of free blocks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    whole, heads = rows[0], rows[1:]
    layers = sorted({head["layer"] for head in heads})
    figure, (recall, distinct, distance) = plt.subplots(1, 3, figsize=(14, 4), dpi=100)

    def by_layer(axes: Any, value: Any, label: str, colour: str) -> None:
        """A line of means and a dot for each KV head."""
        of = [[value(head) for head in heads if head["layer"] == layer] for layer in layers]
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.plot(layers, [sum(values) / len(values) for values in of], color=colour, label=label)
        for layer, values in zip(layers, of, strict=True):
            axes.plot([layer] * len(values), values, ".", color=colour)

    for i, key in enumerate(RECALLS):
        label = "chosen" if key == "selection_recall" else key.removesuffix("_recall")
        by_layer(recall, lambda head, key=key: head[key], label, f"C{i}")
    for i, n in enumerate(whole["distinct_blocks"]):
        by_layer(distinct, lambda head, n=n: head["distinct_blocks"][n], f"{n} neighbours", f"C{i}")
    places = range(len(whole["distance"]))
    distance.bar(places, whole["distance"].values(), label="chosen")
    distance.step(places, whole["distance_random"].values(), where="mid", color="black", label="drawn at random")
    distance.set_xticks(places, whole["distance"].keys(), rotation=45, ha="right")
    recall.set(xlabel="layer", ylabel="share of full attention in the blocks", ylim=(0, 1.02))
    distinct.set(xlabel="layer", ylabel="distinct blocks read together", ylim=(0, None))
    distance.set(xlabel="tokens back to a free block", ylabel="share of the free blocks")
    for axes in (recall, distinct, distance):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.tight_layout()
    save_figure(figure, path)
