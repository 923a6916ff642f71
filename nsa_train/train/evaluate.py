"""Held-out loss: as a whole, by position in the document, and by source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from nsa_train import runtime
from nsa_train.config import schema
from nsa_train.data.loader import NO_LABEL, Batch, Loader
from nsa_train.errors import DataError
from nsa_train.model.attention import Probe
from nsa_train.model.transformer import Transformer
from nsa_train.parallel.engine import sum_over_ranks

FIRST_BUCKET_TOKENS = 128


def position_buckets(seq_len: int, first: int = FIRST_BUCKET_TOKENS) -> list[tuple[int, int]]:
    """Doubling up to the row's length: (0, first), (first, 2 first), ... A row's last bucket ends at seq_len."""
    edges = [0]
    while edges[-1] < seq_len:
        edges.append(min(seq_len, max(first, 2 * edges[-1])))
    return list(pairwise(edges))


@torch.no_grad()
def heldout_losses(
    model: Transformer, loader: Loader, trainer: schema.TrainerConfig, device: torch.device, step: int, wanted: int,
    layers: list[Probe] | None = None,
) -> Iterator[tuple[Batch, torch.Tensor]]:  # fmt: skip
    """This rank's batches of the first `wanted` held-out rows of trainer.seq_len tokens, and each label's loss [T].

    Rows are as long as those of `step`; where they are longer there are fewer, of as many tokens.
    A list given as `layers` receives the statistics of the first batch.
    """
    seq_len = loader.stage(step).seq_len
    rows = max(1, wanted * trainer.seq_len // seq_len)
    micro_rows = max(1, trainer.micro_rows * trainer.seq_len // seq_len)
    model.eval()
    for number, batch in enumerate(loader.sequential(rows, runtime.rank(), runtime.world_size(), micro_rows, step)):
        batch = batch.to(device)
        probes = layers if number == 0 else None
        yield batch, model(batch.tokens, batch.labels, batch.packing, trainer.loss_chunk_tokens, probes).token_losses
    model.train()


@torch.no_grad()
def evaluate(
    model: Transformer, loader: Loader, trainer: schema.TrainerConfig, sources: Sequence[str], device: torch.device,
    step: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Loss in nats per token over the first `val_rows` held-out rows, on all ranks together.

    `by_position` counts from the start of the document as the model sees it: a later piece of a document that is longer
    than a row starts at 0 again. `by_place` counts from the true start of the whole document.
    `layers` holds each layer's `Probe`, from rank 0's first rows.
    """
    seq_len = loader.stage(step).seq_len
    buckets, place_buckets = position_buckets(seq_len), position_buckets(max(seq_len, loader.longest_document))
    edges, place_edges = (torch.tensor([end for _, end in b[:-1]], device=device) for b in (buckets, place_buckets))
    sums = torch.zeros(len(buckets), 2, dtype=torch.float64, device=device)  # loss, tokens
    by_place = torch.zeros(len(place_buckets), 2, dtype=torch.float64, device=device)
    by_source = torch.zeros(len(sources), 2, dtype=torch.float64, device=device)
    layers: list[Probe] | None = [] if runtime.rank() == 0 else None
    for batch, losses in heldout_losses(model, loader, trainer, device, step, trainer.val_rows, layers):
        counted = batch.labels != NO_LABEL
        pairs = torch.stack([losses, torch.ones_like(losses)], dim=1)[counted].double()
        sums.index_add_(0, torch.bucketize(batch.packing.positions[counted], edges, right=True), pairs)
        by_place.index_add_(0, torch.bucketize(batch.places[counted], place_edges, right=True), pairs)
        by_source.index_add_(0, batch.sources[counted].long(), pairs)
    sum_over_ranks(sums, by_place, by_source)
    if not sums[:, 1].sum():
        raise DataError("no held-out token has a label; hold out more text (data.heldout_share or data.heldout_paths)")
    loss, tokens = sums.sum(0).tolist()
    return {
        "loss": loss / tokens,
        "by_position": means([f"{a}-{b}" for a, b in buckets], sums),
        "by_place": means([f"{a}-{b}" for a, b in place_buckets], by_place),
        "by_source": means(sources, by_source),
        "val_tokens": int(tokens),
        "layers": layers or [],
    }


def means(names: Sequence[str], sums: torch.Tensor) -> dict[str, float]:
    """Mean loss of each name that has tokens; sums [names, 2] are losses and tokens."""
    return {name: loss / tokens for name, (loss, tokens) in zip(names, sums.tolist(), strict=True) if tokens}
