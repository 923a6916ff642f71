"""What a trained NSA model loses by its choice of blocks: its held-out loss where other blocks are read.

python scripts/other_blocks.py runs/r1-nsa-seed0

own     chosen by the model: by the scores of the compressed branch's keys (eq. 8 to 11)
random  free blocks drawn at random, others in every layer, as of attention.selection=random
pooled  chosen in the same way, but by the selected branch's own rotated keys, averaged over each compression block
best    those that hold most of a softmax over all keys of the selected branch, mean of a KV head's query heads

Weights are those that were trained with blocks of their own, and nothing else changes. Memory is O(L^2) for documents
of L tokens. Findings go into <out>/other_blocks.json, a run's in place of its earlier ones.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from nsa_train.config.schema import Config
from nsa_train.evaluate.about_runs import about_runs
from nsa_train.evaluate.command import BLOCKS, Options, heldout_store, opened
from nsa_train.evaluate.heldout import longest_documents, losses_in_rows
from nsa_train.model.branches import spec_of
from nsa_train.ops.fixed_blocks import fixed_blocks
from nsa_train.ops.nsa import NSASpec, nsa_attention
from nsa_train.ops.reference import (
    attend,
    cmp_visible,
    compressed_blocks,
    compressed_length,
    importance,
    phi_mean,
    select_blocks,
)
from nsa_train.ops.statistics import block_mass, full_attention
from nsa_train.runtime import seed_of

NAME = "other_blocks"
Choose = Callable[[Tensor, Tensor, NSASpec, int], Tensor]  # q, k_slc of a document, layer -> blocks [L, Hk, n]


def drawn(q: Tensor, k: Tensor, spec: NSASpec, layer: int) -> Tensor:
    draw = torch.tensor(seed_of(0, "blocks", layer) % 2**32, device=q.device)
    return fixed_blocks(torch.arange(len(q), device=q.device), k.shape[1], spec, draw)


def by_pooled_keys(q: Tensor, k: Tensor, spec: NSASpec, layer: int) -> Tensor:
    L, D = len(q), q.shape[-1]
    document = torch.tensor([0, L], dtype=torch.int32)
    pooled = phi_mean(compressed_blocks(k.float(), document, spec, compressed_length(L, spec)))
    _, p = attend(q, pooled, pooled, cmp_visible(L, spec, q.device), D**-0.5)
    return select_blocks(importance(p, L, spec), spec)


def best(q: Tensor, k: Tensor, spec: NSASpec, layer: int) -> Tensor:
    scores = q.new_zeros(len(q), k.shape[1], -(-len(q) // spec.slc_block), dtype=torch.float32)
    for a, p in full_attention(q, k):
        mass = block_mass(p, spec).transpose(0, 1)
        scores[a : a + len(mass), :, : mass.shape[-1]] = mass
    return select_blocks(scores, spec)


CHOICES: dict[str, Choose | None] = {"own": None, "random": drawn, "pooled": by_pooled_keys, "best": best}


def reading(choose: Choose, layers: int) -> Callable[..., Any]:
    """The op, which layers call in turn, with blocks of this choice, document by document."""
    turns = itertools.cycle(range(layers))

    def op(
        q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor,
        gates: Tensor, spec: NSASpec, cu_seqlens: Tensor, **how: Any,
    ) -> Any:  # fmt: skip
        layer = next(turns)
        parts = [choose(q[a:b], k_slc[a:b], spec, layer) for a, b in itertools.pairwise(cu_seqlens.tolist()) if b > a]
        how["blocks"] = torch.cat(parts)
        return nsa_attention(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, spec, cu_seqlens, **how)

    return op


def rows(run: Path, config: Config, options: Options) -> Iterator[dict[str, Any]]:
    """The held-out loss with each choice of blocks, in documents of so many tokens."""
    model, _ = opened(run)
    store = heldout_store(config)
    (length,) = options.lengths
    documents = longest_documents(store.lengths, length, options.samples * length)
    facts = {"run": str(run), "arm": config.arm, "length": length, "corpus_hash": store.hash}
    spec = spec_of(config.attention)
    for name, choose in CHOICES.items():
        op = reading(choose, config.model.layers) if choose else nsa_attention
        with mock.patch("nsa_train.model.attention.nsa_attention", op):
            found = losses_in_rows(model, store, documents, length, length, config.trainer)
        late = {
            place: loss
            for place, loss in found["by_position"].items()
            if int(place.split("-")[0]) >= spec.slc_count * spec.slc_block
        }
        shown = "  ".join(f"{place} {loss:.4f}" for place, loss in late.items())
        print(f"{run}, {name} blocks: held-out loss {found['loss']:.4f}, by position {shown}", flush=True)
        yield facts | {"blocks": name, **found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", default="8192", metavar="N", help="tokens of a document, at most")
    parser.add_argument("--samples", default="20", metavar="N", help="documents of this length, or as many tokens")

    def words(args: argparse.Namespace) -> list[str]:
        return [f"task={BLOCKS}", f"lengths={args.length}", f"samples={args.samples}"]

    return about_runs(NAME, parser, words, rows)


if __name__ == "__main__":
    sys.exit(main())
