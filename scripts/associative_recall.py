"""Whether an arm learns to find what it needs: facts in a document, asked for later in it, and nothing else to learn.

python scripts/associative_recall.py --arms full nsa nsa_random window

A document is filler of random tokens. In its first two thirds stand facts, a key and its value; in the last third
each key stands once more, and the token to predict is its value (multi-query associative recall, arXiv 2312.04927).
Models are small, blocks and windows too, so that most of a document is neither in the window nor in forced blocks;
`--set` takes other sizes, the paper's for example. Only answers for which NSA has to select count: the fact's block is
no forced one, and the fact lies before the window. Reported are the share of them that is right, and, of each layer,
the share whose block was read, beside what blocks drawn at random would give.

Curves go into <out>/<name>.json while they grow, an arm's in place of its earlier ones, and into a PNG beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_train import runtime
from nsa_train.bench import results
from nsa_train.bench.figures import save_figure
from nsa_train.compare.gates import Subject
from nsa_train.config.load import load_config
from nsa_train.config.schema import Config
from nsa_train.data.loader import NO_LABEL
from nsa_train.errors import NsaTrainError
from nsa_train.model.attention import Attended
from nsa_train.model.branches import spec_of
from nsa_train.model.transformer import Transformer
from nsa_train.packing import Packing
from nsa_train.parallel.engine import start_processes, stop_processes

NAME = "associative_recall"
SMALL = (
    "model.layers=2", "model.dense_layers=2", "model.width=96", "model.vocab=300", "model.heads=8", "model.kv_heads=1",
    "attention.slc_count=3", "attention.slc_local=1", "attention.window=16", "trainer.seq_len=192",
    "trainer.batch_rows=16", "trainer.steps=700", "schedule=wsd",
)  # fmt: skip
ASKED_ROWS = 64  # of an evaluation, about
STYLES = ("-", "--", "-.", ":")  # of layers


class Task(NamedTuple):
    """facts: told in a document, and asked for once each; words: how many keys there are, and as many values."""

    facts: int
    words: int


class Documents(NamedTuple):
    """[B, T] each: tokens; labels, NO_LABEL but at a question's key; where the fact lies that is asked for, or -1."""

    tokens: Tensor
    labels: Tensor
    fact: Tensor


def documents(config: Config, task: Task, key: object) -> Documents:
    """The first tokens of the vocabulary are keys, then come values, then filler. A key stands at an even place."""
    facts, words = task
    rows, length = config.trainer.batch_rows, config.trainer.seq_len
    draw = torch.Generator().manual_seed(runtime.seed_of(config.seed, NAME, key))
    tokens = torch.randint(2 * words, config.model.vocab, (rows, length), generator=draw)
    labels, fact = torch.full_like(tokens, NO_LABEL), torch.full_like(tokens, -1)
    told, row = length // 3, torch.arange(rows)[:, None]  # pairs of places in the first two thirds
    asked = length // 2 - told
    at = 2 * torch.rand(rows, told, generator=draw).argsort(1)[:, :facts]
    question = 2 * (told + torch.rand(rows, asked, generator=draw).argsort(1)[:, :facts])
    keys = torch.rand(rows, words, generator=draw).argsort(1)[:, :facts]
    values = torch.randint(words, 2 * words, (rows, facts), generator=draw)
    for place in (at, question):
        tokens[row, place], tokens[row, place + 1] = keys, values
    labels[row, question], fact[row, question] = values, at
    return Documents(tokens, labels, fact)


class Selected(NamedTuple):
    """Of every token: whether its fact is out of reach of a layer's window and forced blocks, of which two layers, one
    upon the other, reach a few; and the chance that blocks drawn at random hold it."""

    needs: Tensor
    chance: Tensor


def selected(config: Config, fact: Tensor) -> Selected:
    """By the sizes of `attention`, also of arms that do not select."""
    spec, place = spec_of(config.attention), torch.arange(fact.shape[1])
    block, own = fact // spec.slc_block, place // spec.slc_block
    free = own - spec.slc_local + 1 - spec.slc_init  # blocks that are not forced
    needs = (fact >= 0) & (block >= spec.slc_init) & (block <= own - spec.slc_local) & (place - fact >= spec.window)
    drawn = spec.slc_count - spec.slc_init - spec.slc_local
    return Selected(needs, (drawn / free.clamp_min(1)).clamp_max(1).expand_as(fact))


@torch.no_grad()
def ask(model: Transformer, config: Config, task: Task, packing: Packing) -> dict[str, Any]:
    """loss, right and asked of answers that need selection; read by layer and chance where blocks are chosen."""
    model.eval()
    found = [_ask(model, config, task, packing, i) for i in range(-(-ASKED_ROWS // config.trainer.batch_rows))]
    model.train()
    parts = {name: torch.cat([one[name] for one in found]).double() for name in found[0]}
    read = [parts[name].mean().item() for name in parts if name.startswith("layer")]
    whole = {name: parts[name].mean().item() for name in ("loss", "right", "chance")}
    return {**whole, "asked": len(parts["right"]), "read": read, "chance": whole["chance"] if read else None}


def _ask(model: Transformer, config: Config, task: Task, packing: Packing, number: int) -> dict[str, Tensor]:
    device, made = packing.cu_seqlens.device, documents(config, task, ("asked", number))
    needs, chance = (part.flatten() for part in selected(config, made.fact))
    fact = (made.fact.flatten() // config.attention.slc_block)[needs].to(device)
    blocks: dict[str, Tensor] = {}

    def watch(layer: int, attended: Attended) -> None:
        if attended.blocks is not None:
            blocks[f"layer {layer}"] = (attended.blocks[needs.to(device)] == fact[:, None, None]).any(-1)

    model.watch(watch)
    logits = model.logits(made.tokens.flatten().to(device), packing)[needs.to(device)].float()
    model.watch(None)
    answers = made.labels.flatten()[needs].to(device)
    losses = torch.nn.functional.cross_entropy(logits, answers, reduction="none")
    read = {name: held.float().mean(1).cpu() for name, held in blocks.items()}  # mean over the KV heads
    return {"loss": losses.cpu(), "right": (logits.argmax(-1) == answers).cpu(), "chance": chance[needs], **read}


def curve(config: Config, task: Task, every: int, minutes: float) -> Iterator[dict[str, Any]]:
    """A row for each evaluation, until all steps are done or the time is over."""
    device, steps, rows = runtime.device(), config.trainer.steps, config.trainer.batch_rows
    packing = Packing.from_lengths((config.trainer.seq_len,) * rows).to(device)
    subject = Subject(config, device, steps)
    model, begun = subject.model(), time.monotonic()
    made = (documents(config, task, step) for step in range(steps))
    batches = ((one.tokens.flatten().to(device), one.labels.flatten().to(device), packing) for one in made)
    for step, _ in enumerate(subject.train(model, batches, subject.rates(steps, config.optim.lr))):
        over = time.monotonic() - begun > 60 * minutes
        if (step + 1) % every == 0 or step + 1 == steps or over:
            row = ask(model, config, task, packing)
            read = " ".join(f"{share:.0%}" for share in row["read"])
            runtime.log.info(
                "%s, step %d: %.1f%% of %d answers right, loss %.3f%s",
                config.arm, step + 1, 100 * row["right"], row["asked"], row["loss"],
                f", their blocks read {read} (by chance {row['chance']:.0%})" if read else "",
            )  # fmt: skip
            yield {"arm": config.arm, "step": step + 1, **row}
        if over:
            return


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (right, read) = plt.subplots(1, 2, figsize=(13, 4.5), dpi=100)
    for number, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
        mine = [row for row in rows if row["arm"] == arm]
        steps = [row["step"] for row in mine]
        right.plot(steps, [row["right"] for row in mine], color=f"C{number}", label=arm)
        for layer in range(len(mine[0]["read"])):
            shares = [row["read"][layer] for row in mine]
            read.plot(steps, shares, color=f"C{number}", ls=STYLES[layer % len(STYLES)], label=f"{arm}, layer {layer}")
    chances = [row["chance"] for row in rows if row["chance"] is not None]
    if chances:
        read.axhline(chances[0], color="gray", lw=1, label="by chance")
        read.legend()
    right.set(xlabel="steps", ylabel="answers that are right", ylim=(-0.02, 1.02))
    read.set(xlabel="steps", ylabel="answers whose block was read", ylim=(-0.02, 1.02))
    right.legend()
    for place in (right, read):
        place.grid(alpha=0.3)
    figure.tight_layout()
    save_figure(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["full", "nsa", "nsa_random", "window"], metavar="ARM")
    parser.add_argument("--facts", type=int, default=8, help="of a document, and questions")
    parser.add_argument("--words", type=int, default=32, help="that are keys, and as many values")
    parser.add_argument("--every", type=int, default=50, help="steps from one evaluation to the next")
    parser.add_argument("--minutes", type=float, default=60.0, help="of an arm, at most")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of JSON and PNG")
    parser.add_argument("--name", default=NAME, help="of JSON and PNG")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="for all arms")
    args = parser.parse_args()
    runtime.setup_console()
    try:
        return run(args)
    except NsaTrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def run(args: argparse.Namespace) -> int:
    configs = [load_config([*SMALL, *args.set, f"attention={arm}"]) for arm in args.arms]
    task = Task(args.facts, args.words)
    path = args.out / f"{results.safe_name(args.name)}.json"
    about = {"facts": args.facts, "words": args.words, "set": [*map(results.without_folders, args.set)]}
    _check(configs, task, args.every, path, about)
    runtime.launch_alone()
    start_processes(runtime.device(), configs[0].parallel.timeout_s)
    try:
        for config in configs:
            rows: list[dict[str, Any]] = []
            for row in curve(config, task, args.every, args.minutes):
                rows.append({**row, **about})
                found = results.with_earlier(path, rows, lambda row: row["arm"])
                results.write_result(path.stem, NAME, found, folder=args.out)
                plot(found, path.with_suffix(".png"))
    finally:
        stop_processes()
    print(path)
    return 0


def _check(configs: list[Config], task: Task, every: int, path: Path, about: dict[str, Any]) -> None:
    """NsaTrainError for what would be found wrong only after a training."""
    if every < 1:
        raise NsaTrainError(f"--every {every} must be 1 or more")
    for config in configs:
        vocab, length = config.model.vocab, config.trainer.seq_len
        if not 0 < task.words < vocab // 2:
            raise NsaTrainError(f"--words {task.words} must be positive and less than half of model.vocab={vocab}")
        most = min(task.words, length // 2 - length // 3)
        if not 0 < task.facts <= most:
            raise NsaTrainError(f"--facts {task.facts} must be 1 to {most}")
        if not selected(config, documents(config, task, 0).fact).needs.any():
            raise NsaTrainError("no fact lies behind window and forced blocks; set a longer trainer.seq_len")
    results.make_folder(path.parent)
    for row in results.with_earlier(path, [], lambda row: row["arm"]):
        if differ := {key: row.get(key) for key in about if row.get(key) != about[key]}:
            raise NsaTrainError(f"{path} holds answers to other questions ({differ}); choose another --name")


if __name__ == "__main__":
    sys.exit(main())
