"""Held-out losses of each document, which a comparison of runs pairs and resamples: `heldout.npz` of a run folder."""

from __future__ import annotations

import dataclasses
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nsa_train.config import schema
from nsa_train.data.loader import NO_LABEL, Loader
from nsa_train.errors import RunFolderError
from nsa_train.model.transformer import Transformer
from nsa_train.parallel.engine import sum_over_ranks
from nsa_train.train.evaluate import FIRST_BUCKET_TOKENS, heldout_losses, position_buckets

HELDOUT = "heldout.npz"
GRAM = 4  # tokens that must have occurred before, for the next one to be recalled


@dataclass(frozen=True)
class HeldOut:
    """Sums over the labels of N documents, in P buckets of position and R of distance, each from edge to edge.

    document        [N]        int64, index into the held-out split of the corpus
    source          [N]        int32, index into `sources`
    sources         [S]        names
    position        [N, P, 2]  float64, loss in nats and labels, by position in the document as the model sees it
    position_edges  [P + 1]    int64
    recall          [N, R, 2]  the same of the labels whose four preceding tokens stood together before in the document,
                               by the distance back to where they did so last
    recall_edges    [R + 1]    int64, in multiples of the window: 0, w, 2w, 4w, ...
    """

    document: np.ndarray
    source: np.ndarray
    sources: np.ndarray
    position: np.ndarray
    position_edges: np.ndarray
    recall: np.ndarray
    recall_edges: np.ndarray

    def save(self, path: Path) -> None:
        """Write the file as a whole."""
        aside = path.with_name(f".{path.name}.tmp")
        with aside.open("wb") as file:
            np.savez_compressed(file, **dataclasses.asdict(self))
        os.replace(aside, path)

    @staticmethod
    def load(path: Path) -> HeldOut:
        try:
            with np.load(path, allow_pickle=False) as file:
                return HeldOut(**{field.name: file[field.name] for field in dataclasses.fields(HeldOut)})
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise RunFolderError(f"{path}: no held-out losses by document ({error}); finish the run again") from error


def recall_distances(tokens: np.ndarray) -> np.ndarray:
    """How far back the four tokens up to each one stood together last: [L] integers -> int64 [L], 0 where they did not.

    A token at place t, whose distance is s, and the three before it are those at t - s; the label of t is then what a
    model can recall from place t - s + 1.
    """
    found = np.zeros(len(tokens), np.int64)
    if len(tokens) <= GRAM:
        return found
    same = np.asarray(tokens, np.int64)
    for reach in (1, 2):  # numbers of pairs, then of pairs of pairs: equal where the tokens are
        pairs = same[:-reach] * (int(same.max()) + 1) + same[reach:]
        same = np.unique(pairs, return_inverse=True)[1]
    order = np.argsort(same, kind="stable")
    again = same[order[1:]] == same[order[:-1]]
    found[GRAM - 1 + order[1:][again]] = np.diff(order)[again]
    return found


@torch.no_grad()
def document_losses(
    model: Transformer, loader: Loader, trainer: schema.TrainerConfig, window: int, sources: Sequence[str],
    device: torch.device, step: int,
) -> HeldOut:  # fmt: skip
    """By document, of the first `heldout_rows` rows of trainer.seq_len (None: `val_rows`), on all ranks together."""
    seq_len, source = loader.stage(step).seq_len, loader.document_sources
    edges = [
        np.array([0, *(end for _, end in position_buckets(seq_len, first))]) for first in (FIRST_BUCKET_TOKENS, window)
    ]
    inner = [torch.from_numpy(some[1:-1]).to(device) for some in edges]
    position, recall = (
        torch.zeros(len(source), len(some) - 1, 2, dtype=torch.float64, device=device) for some in edges
    )
    wanted = trainer.heldout_rows or trainer.val_rows
    for batch, losses in heldout_losses(model, loader, trainer, device, step, wanted):
        lengths = torch.tensor(batch.packing.lengths)
        document = torch.tensor(batch.documents).repeat_interleave(lengths).to(device)
        pieces = batch.tokens.cpu().numpy()
        distances = np.concatenate([recall_distances(p) for p in np.split(pieces, lengths.cumsum(0)[:-1].numpy())])
        distance = torch.from_numpy(distances).to(device)
        counted = batch.labels != NO_LABEL
        pairs = torch.stack([losses, torch.ones_like(losses)], dim=1).double()
        for sums, bounds, place, these in (
            (position, inner[0], batch.packing.positions.long(), counted),
            (recall, inner[1], distance, counted & (distance > 0)),
        ):
            bucket = torch.bucketize(place[these], bounds, right=True)
            sums.view(-1, 2).index_add_(0, document[these] * sums.shape[1] + bucket, pairs[these])
    sum_over_ranks(position, recall)
    seen = np.flatnonzero(position[..., 1].sum(1).cpu().numpy())
    by_position, by_recall = (sums.cpu().numpy()[seen] for sums in (position, recall))
    return HeldOut(seen, source[seen], np.array(sources), by_position, edges[0], by_recall, edges[1])
