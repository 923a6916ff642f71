"""When an arm learns to copy from its context: a small model on made-up text that repeats itself, minutes on a CPU.

python scripts/learn_copies.py full full_gated nsa nsa:attention.gate_scale=1 --seeds 0 1

Until a model copies, hardly anything in its context helps, so what stands in the way of learning shows here first. A
row is 96 tokens of 64 kinds: random ones, of which three in ten follow from the token before; behind 16 to 47 of them
everything is as it was so many tokens before. Writes docs/results/copies_cpu.json and .png.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_train.bench import results
from nsa_train.config.load import load_config
from nsa_train.config.schema import Config
from nsa_train.errors import NsaTrainError
from nsa_train.model.transformer import Transformer
from nsa_train.packing import Packing
from nsa_train.train.optim import build_optimizer, lr_at

KINDS, ROWS, TOKENS, PERIODS, FOLLOWS = 64, 24, 96, (16, 48), 0.3
# A query reads 32 tokens of the window and 2 chosen blocks of 8 beside the 3 forced ones.
SETTINGS = (
    "experiment=tiny", "model.vocab=512", "model.layers=3", "model.dense_layers=3", "model.heads=8", "model.kv_heads=1",
    "model.init_std=0.06", "moe.expert_width=128", "attention.window=32", "attention.slc_block=8",
    "attention.slc_count=5", "optim.lr=4e-3", f"trainer.seq_len={TOKENS}", f"trainer.batch_rows={ROWS}",
    "trainer.steps=500",
)  # fmt: skip
EVERY = 25  # steps in a point of the curve
LEARNED = 1.0  # nats a copied token, from 3.6 at the start


class Batch(NamedTuple):
    """Of all rows, [ROWS * TOKENS]: tokens; labels, -100 for none; copied: labels whose like stood in the row before,
    and so did the two tokens that lead to them."""

    tokens: Tensor
    labels: Tensor
    copied: Tensor


class Text:
    """The same batches for every arm of a seed."""

    def __init__(self, seed: int) -> None:
        self.drawn = torch.Generator().manual_seed(seed)
        self.odds = 1 / (torch.arange(KINDS) + 5.0)
        self.follower = torch.randperm(KINDS, generator=self.drawn)

    def batch(self) -> Batch:
        x = torch.multinomial(self.odds, ROWS * TOKENS, True, generator=self.drawn).view(ROWS, TOKENS)
        follows = torch.rand(ROWS, TOKENS, generator=self.drawn) < FOLLOWS
        period = torch.randint(*PERIODS, (ROWS,), generator=self.drawn)
        for t in range(1, TOKENS):
            x[:, t] = torch.where(follows[:, t], self.follower[x[:, t - 1]], x[:, t])
            earlier = (t - period).clamp(min=0)
            x[:, t] = torch.where(t >= period, x[torch.arange(ROWS), earlier], x[:, t])
        labels = torch.cat([x[:, 1:], torch.full((ROWS, 1), -100)], 1)
        copied = (torch.arange(1, TOKENS + 1) >= period[:, None] + 2) & (labels >= 0)
        return Batch(x.flatten(), labels.flatten(), copied.flatten())


def config_of(variant: str, seed: int) -> Config:
    """Of `arm:key=value,...`. Raises ConfigError."""
    arm, _, words = variant.partition(":")
    return load_config([*SETTINGS, f"attention={arm}", f"seed={seed}", *filter(None, words.split(","))])


def train(variant: str, seed: int) -> dict[str, Any]:
    """A row of the result: the variant trained from the seed's initial weights on the seed's text."""
    config = config_of(variant, seed)
    steps = config.trainer.steps
    model = Transformer(config.model, config.attention, config.moe)
    model.start(seed)
    text = Text(seed)
    counts = torch.zeros(config.model.vocab)
    for _ in range(20):
        counts += torch.bincount(text.batch().tokens, minlength=len(counts))
    model.head.set_prior(counts)
    optimizer, packing = build_optimizer(model, config.optim), Packing.from_lengths([TOKENS] * ROWS)
    curve: list[dict[str, Any]] = []
    losses, copies = [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, steps, config.optim.lr, config.schedule)
        tokens, labels, copied = text.batch()
        probes: list[dict[str, Any]] | None = [] if (step + 1) % EVERY == 0 else None
        of_tokens = model(tokens, labels, packing, config.trainer.loss_chunk_tokens, probes).token_losses
        loss = of_tokens.sum() / (labels >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()
        losses.append(loss.item())
        copies.append(of_tokens[copied].mean().item())
        if probes is not None:
            loss_now, copied_now = statistics.fmean(losses[-EVERY:]), statistics.fmean(copies[-EVERY:])
            gates = [probe["gates"] for probe in probes if "gates" in probe]  # by branch, of each layer
            curve.append({"step": step + 1, "loss": loss_now, "copied": copied_now, "gates": gates})
            print(f"{variant}, seed {seed}: step {step + 1}, copied tokens {copied_now:.3f} nats", flush=True)
    learned = next((point["step"] for point in curve if point["copied"] < LEARNED), None)
    return {"variant": variant, "seed": seed, "steps": steps, "learned_step": learned, "curve": curve}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss of copied tokens against steps, a colour a variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=110)
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for row in rows:
        steps, copied = zip(*((point["step"], point["copied"]) for point in row["curve"]), strict=True)
        number = variants.index(row["variant"])
        axes.plot(
            steps, copied, color=f"C{number}", lw=1, label=row["variant"] if row["seed"] == rows[0]["seed"] else None
        )
    axes.set(xlabel="step", ylabel="nats a copied token", title="learning to copy, a line a seed")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", metavar="ARM[:key=value,...]", help="options of configs/attention")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--name", default="copies_cpu", help="of the result")
    args = parser.parse_args()
    try:
        path = results.RESULTS / f"{results.safe_name(args.name)}.json"
        for variant in args.variants:  # all of them, before any is trained
            config_of(variant, args.seeds[0])
    except NsaTrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    rows = [train(variant, seed) for seed in args.seeds for variant in args.variants]
    rows = results.with_earlier(path, rows, lambda row: (row["variant"], row["seed"]))
    for row in rows:
        print(f"{row['variant']}, seed {row['seed']}: {row['learned_step'] or 'more than ' + str(row['steps'])} steps")
    print(results.write_result(args.name, "copies", rows, folder=path.parent))
    plot(rows, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
