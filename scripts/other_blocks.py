"""What a trained NSA model loses by its choice of blocks: its held-out loss where other blocks are read.

python scripts/other_blocks.py runs/r1-nsa-seed0

own     chosen by the model: by the scores of the compressed branch's keys (eq. 8 to 11)
random  free blocks drawn at random, as of attention.selection=random
pooled  chosen in the same way, but by the selected branch's own rotated keys, averaged over each compression block
best    those that hold most of a softmax over all keys of the selected branch, summed over a KV head's query heads

Weights are those that were trained with blocks of their own, and nothing else changes. Memory is O(L^2) for documents
of L tokens. Findings go into <out>/other_blocks.json, a run's in place of its earlier ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_train import runtime
from nsa_train.bench import results
from nsa_train.config.schema import Config
from nsa_train.errors import ConfigError, NsaTrainError
from nsa_train.evaluate.command import BLOCKS, Options, check_lengths, heldout_store, misfit, opened
from nsa_train.evaluate.heldout import longest_documents, losses_in_rows
from nsa_train.model.branches import spec_of
from nsa_train.ops.fixed_blocks import fixed_blocks
from nsa_train.ops.nsa import NSASpec, nsa_attention
from nsa_train.ops.reference import attend, cmp_visible, compressed_length, importance, select_blocks
from nsa_train.ops.statistics import full_attention
from nsa_train.train.folder import read_config

NAME = "other_blocks"
Choose = Callable[[Tensor, Tensor, NSASpec], Tensor]  # q, k_slc, spec of a document -> blocks [L, Hk, n]


def drawn(q: Tensor, k: Tensor, spec: NSASpec) -> Tensor:
    return fixed_blocks(torch.arange(len(q), device=q.device), k.shape[1], spec, torch.tensor(0, device=q.device))


def by_pooled_keys(q: Tensor, k: Tensor, spec: NSASpec) -> Tensor:
    L, D = len(q), q.shape[-1]
    if not compressed_length(L, spec):
        return fixed_blocks(torch.arange(L, device=q.device), k.shape[1], spec)
    pooled = k.float().unfold(0, spec.cmp_block, spec.cmp_stride).mean(-1)  # [C, Hk, D]
    _, p = attend(q, pooled, pooled, cmp_visible(L, spec, q.device), D**-0.5)
    return select_blocks(importance(p, L, spec), spec)


def best(q: Tensor, k: Tensor, spec: NSASpec) -> Tensor:
    L, J = len(q), -(-len(q) // spec.slc_block)
    scores = q.new_zeros(L, k.shape[1], J, dtype=torch.float32)
    for a, p in full_attention(q, k):
        mass = F.pad(p.sum(1), (0, J * spec.slc_block - p.shape[-1])).unflatten(-1, (J, -1)).sum(-1)  # [Hk, Q, J]
        scores[a : a + mass.shape[1]] = mass.transpose(0, 1)
    return select_blocks(scores, spec)


CHOICES: dict[str, Choose | None] = {"own": None, "random": drawn, "pooled": by_pooled_keys, "best": best}


def reading(choose: Choose) -> Callable[..., Any]:
    """The op with blocks of this choice, document by document."""

    def op(
        q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor,
        gates: Tensor, spec: NSASpec, cu_seqlens: Tensor, **how: Any,
    ) -> Any:  # fmt: skip
        parts = [choose(q[a:b], k_slc[a:b], spec) for a, b in pairwise(cu_seqlens.tolist()) if b > a]
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
    free = spec_of(config.attention).slc_count * spec_of(config.attention).slc_block
    for name, choose in CHOICES.items():
        op = reading(choose) if choose else nsa_attention
        with mock.patch("nsa_train.model.attention.nsa_attention", op):
            found = losses_in_rows(model, store, documents, length, length, config.trainer)
        late = {place: loss for place, loss in found["by_position"].items() if int(place.split("-")[0]) >= free}
        shown = "  ".join(f"{place} {loss:.4f}" for place, loss in late.items())
        print(f"{run}, {name} blocks: held-out loss {found['loss']:.4f}, by position {shown}", flush=True)
        yield facts | {"blocks": name, **found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    parser.add_argument("--length", default="8192", metavar="N", help="tokens of a document, at most")
    parser.add_argument("--samples", default="20", metavar="N", help="documents of this length, or as many tokens")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the findings")
    args = parser.parse_args()
    runtime.setup_console()
    file = args.out / f"{NAME}.json"
    try:
        options = Options.parse([f"task={BLOCKS}", f"lengths={args.length}", f"samples={args.samples}"])
        configs = {run: read_config(run) for run in args.runs}
        for run, config in configs.items():
            check_lengths(options, config)
            if reason := misfit(BLOCKS, config.attention):
                raise ConfigError(f"{run} is of the arm {config.arm}: {reason}")
        results.with_earlier(file, [], lambda row: row["run"])  # before anything is read
        for run, config in configs.items():
            found = results.with_earlier(file, list(rows(run, config, options)), lambda row: row["run"])
            print(results.write_result(NAME, NAME, found, folder=args.out))
    except NsaTrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
