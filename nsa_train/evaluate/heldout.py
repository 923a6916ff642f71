"""Loss on the same held-out labels in rows of any length, by document: only what a row shows of the past differs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nsa_train import runtime
from nsa_train.config.schema import TrainerConfig
from nsa_train.data.loader import NO_LABEL
from nsa_train.data.store import TokenStore
from nsa_train.model.transformer import Transformer
from nsa_train.packing import Packing
from nsa_train.train.evaluate import means, position_buckets


def longest_documents(lengths: np.ndarray, most: int, tokens: int) -> np.ndarray:
    """Numbers of the longest documents that have at most `tokens` together, one at least; int64, ascending.

    lengths [documents], of which each counts as `most` at most: those that are longer come in a fixed random order.
    """
    cut = np.minimum(lengths, most)
    drawn = np.random.default_rng(runtime.seed_of("eval", "heldout")).permutation(len(cut))
    order = drawn[np.argsort(-cut[drawn], kind="stable")]
    return np.sort(order[: max(1, np.searchsorted(cut[order].cumsum(), tokens, side="right"))])


@torch.no_grad()
def losses_in_rows(
    model: Transformer, store: TokenStore, documents: np.ndarray, most: int, length: int, trainer: TrainerConfig
) -> dict[str, Any]:
    """Loss in nats per token on the first `most` tokens of each document, all but its first one being labels.

    Rows are pieces of `length` tokens, in which positions restart; the last one of a document may be shorter. The label
    of a piece's last token is the first one of the next piece, so at every length the same tokens are labels.

    by_position  by the place in the row      by_place  in the document
    by_document  lists over `documents`: their number in the held-out split, source, labels, and sum of loss in nats
    """
    names = store.manifest["sources"]
    buckets = [position_buckets(tokens) for tokens in (length, most)]
    sums = [np.zeros((len(some), 2)) for some in buckets]
    by_document = []
    for document in documents.tolist():
        begin, end = store.offsets[document : document + 2].tolist()
        tokens = torch.from_numpy(np.asarray(store.tokens[begin : min(end, begin + most)], np.int64))
        losses = _token_losses(model, tokens, length, trainer)
        by_document.append([losses.sum(), len(losses)])
        place = np.arange(len(losses))
        for total, some, of in zip(sums, buckets, (place % length, place), strict=True):
            edges = [0, *(end for _, end in some)]
            total += np.stack([np.histogram(of, edges, weights=values)[0] for values in (losses, None)], 1)
    by_position, by_place = (
        means([f"{a}-{b}" for a, b in some], torch.from_numpy(total)) for some, total in zip(buckets, sums, strict=True)
    )
    found, source = np.array(by_document), store.sources[documents]
    by_source = np.stack([found[source == number].sum(0) for number in range(len(names))])
    loss, labels = found.sum(0).tolist()
    return {
        "loss": loss / labels, "labels": int(labels), "by_position": by_position, "by_place": by_place,
        "by_source": means(names, torch.from_numpy(by_source)),
        "by_document": {
            "document": documents.tolist(), "source": [names[number] for number in source],
            "labels": found[:, 1].astype(int).tolist(), "loss": found[:, 0].tolist(),
        },
    }  # fmt: skip


def _token_losses(model: Transformer, tokens: torch.Tensor, length: int, trainer: TrainerConfig) -> np.ndarray:
    """Of a document's labels, float64 [n - 1]; a forward pass has the tokens of one in training, a piece at least."""
    device = model.embed.weight.device
    labels = torch.cat([tokens[1:], tokens.new_full((1,), NO_LABEL)])
    together = length * max(1, trainer.micro_rows * trainer.seq_len // length)
    losses = []
    for x, y in zip(tokens.split(together), labels.split(together), strict=True):
        packing = Packing.from_lengths([len(piece) for piece in x.split(length)]).to(device)
        losses.append(model(x.to(device), y.to(device), packing, trainer.loss_chunk_tokens).token_losses)
    return torch.cat(losses)[:-1].double().cpu().numpy()
