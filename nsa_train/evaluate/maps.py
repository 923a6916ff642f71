"""Attention maps of one document, as in the paper's figure 8: what each query attends to over all keys before it.

Of NSA that is a softmax over all keys of the selected branch; the model itself takes it over the chosen blocks only,
which are drawn beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_train.bench.figures import save_figure
from nsa_train.model.attention import Attended
from nsa_train.model.transformer import Transformer
from nsa_train.ops.nsa import NSASpec
from nsa_train.ops.statistics import full_attention
from nsa_train.packing import Packing

CELLS = 256  # a side of a map, at most
COLOURS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)  # their bounds; few, so that the PNG is small


class Map(NamedTuple):
    """Of the first KV head of a layer; S cells a side.

    heads   query heads that are drawn
    maps    [heads + 1, S, S] fp32  largest probability of a cell's queries and keys: of these heads, and of the mean
                                    over all heads of the KV head
    chosen  [S, S] fp32 or None     share of a cell's queries that read the block of its keys
    """

    layer: int
    heads: tuple[int, ...]
    maps: Tensor
    chosen: Tensor | None


def cell_tokens(length: int) -> int:
    """Tokens on a side of a cell: the smallest power of two that leaves at most CELLS cells."""
    return 1 << (-(-length // CELLS) - 1).bit_length()


@torch.no_grad()
def attention_maps(model: Transformer, tokens: Tensor, spec: NSASpec) -> list[Map]:
    """Of the first, the middle and the last layer, for one document: tokens [L]."""
    last, found = len(model.layers) - 1, []

    def watch(layer: int, attended: Attended) -> None:
        if layer in (0, last // 2, last):
            found.append(map_of(layer, attended, spec))

    device = model.embed.weight.device
    model.watch(watch)
    model.hidden(tokens.to(device), Packing.from_lengths([len(tokens)]).to(device))
    model.watch(None)
    return found


def map_of(layer: int, attended: Attended, spec: NSASpec) -> Map:
    """Of one document; the first and the last head of the first KV head."""
    q, k, blocks = attended
    L, G = len(q), q.shape[1] // k.shape[1]
    heads, cell = tuple(sorted({0, G - 1})), cell_tokens(L)
    maps = torch.zeros(len(heads) + 1, -(-L // cell), -(-L // cell), device=q.device)
    for a, p in full_attention(q[:, :G], k[:, :1], multiple=cell):
        pooled = F.max_pool2d(torch.cat([p[0, list(heads)], p[0].mean(0, keepdim=True)]), cell, ceil_mode=True)
        _, rows, columns = pooled.shape
        maps[:, a // cell : a // cell + rows, :columns] = pooled
    return Map(layer, heads, maps.cpu(), None if blocks is None else _chosen(blocks[:, 0], cell, spec).cpu())


def _chosen(blocks: Tensor, cell: int, spec: NSASpec) -> Tensor:
    """[L, n] -> [S, S], see `Map`."""
    L, J = len(blocks), -(-len(blocks) // spec.slc_block)
    taken = torch.zeros(L, J + 1, device=blocks.device)
    taken.scatter_(1, torch.where(blocks < 0, J, blocks).long(), 1.0)
    by_queries = F.avg_pool1d(taken[:, :J].T, cell, ceil_mode=True).T  # [S, J]
    by_token = by_queries.repeat_interleave(spec.slc_block, 1)[:, :L]
    return F.avg_pool1d(by_token, cell, ceil_mode=True)


def plot_maps(found: Sequence[Map], title: str, path: Path) -> None:
    """A row for each layer; columns: heads, their mean, chosen blocks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import BoundaryNorm

    colours = plt.get_cmap("magma_r", len(COLOURS) - 1).with_extremes(under="white")
    columns = len(found[0].maps) + (found[0].chosen is not None)
    size = {"figsize": (1 + 2.6 * columns, 0.8 + 2.75 * len(found)), "dpi": 100}
    figure, axes = plt.subplots(len(found), columns, squeeze=False, layout="constrained", **size)
    for places, (layer, heads, maps, chosen) in zip(axes, found, strict=True):
        names = [*(f"layer {layer}, head {head}" for head in heads), f"layer {layer}, mean of the KV head's heads"]
        for place, name, cells in zip(places, names, maps, strict=False):
            image = place.imshow(cells, norm=BoundaryNorm(COLOURS, colours.N), cmap=colours, interpolation="nearest")
            place.set_title(name, fontsize=8)
        if chosen is not None:
            places[-1].imshow(chosen, vmin=0, vmax=1, cmap=plt.get_cmap("Greys", 5), interpolation="nearest")
            places[-1].set_title(f"layer {layer}, blocks it reads", fontsize=8)
    for place in axes.flat:
        place.set(xticks=[], yticks=[])
    figure.colorbar(image, ax=axes, label="largest attention in a cell", fraction=0.03)
    figure.suptitle(title, fontsize=9)
    figure.supxlabel("keys", fontsize=8)
    figure.supylabel("queries", fontsize=8)
    save_figure(figure, path)
