"""`nsa-train compare gates`: what must hold for every arm before its loss is looked at, above all that nothing leaks.

A lower loss is exactly what a leak from the future produces, and some leaks show after a thousand steps only. Every
gate runs an arm in the precision and on the kernels of its runs; those that train do so through the engine of `train`.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_train import runtime
from nsa_train.bench import results
from nsa_train.config.load import load_config, to_tree
from nsa_train.config.schema import Config
from nsa_train.data.loader import NO_LABEL
from nsa_train.errors import NsaTrainError
from nsa_train.model.branches import OWN_KV, kv_name
from nsa_train.model.transformer import Transformer
from nsa_train.packing import Packing
from nsa_train.parallel.engine import Engine, engine_settings, start_processes, stop_processes
from nsa_train.train.optim import build_optimizer, lr_at

VOCAB = 512  # at most, of models that are trained on random tokens
ROWS, ROW_TOKENS = 8, 256  # of their batches
LEAST_STEPS = 1500  # before which a leak through overlapping compressed blocks may not show
LEAK_NATS = 0.005  # below ln V
HELDOUT_ROWS = 256
INITIAL_NATS = 0.05  # around that of a guess
OVERFIT_STEPS, OVERFIT_ROWS, OVERFIT_NATS = 300, 2, 0.1
EQUAL_STEPS, EQUAL_LR = 20, 1e-3  # at a high rate rounding alone grows to whole nats
LATE_PLACES = 24  # of the borders, whose gradients are looked at: late ones, where every branch leaves tokens out
SHUT, OPEN = -200.0, 200.0  # biases whose sigmoids are 0 and 1, with slope 0: training leaves them alone
RELATIVE_RMS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of logits that should be equal
STEP_NATS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # of losses that should be


class Finding(NamedTuple):
    passed: bool
    found: str
    demanded: str


Case = tuple[Tensor, Tensor, Packing]  # tokens, labels, packing


@dataclass(frozen=True)
class Subject:
    """An arm under test: its configuration, where and how it runs, and the steps on random tokens."""

    config: Config
    device: torch.device
    steps: int

    @property
    def dtype(self) -> torch.dtype:
        return runtime.dtype_of(self.config.trainer.dtype)

    @property
    def vocab(self) -> int:
        return min(VOCAB, self.config.model.vocab)

    def model(self, full: bool = False, **fields: Any) -> Transformer:
        """The arm, or full attention with its experts, in fp32 on the CPU; `fields` of `model` are replaced."""
        attention = self.config.attention
        if full:
            attention = dataclasses.replace(attention, branches=("full",), gate=False)
        made = Transformer(dataclasses.replace(self.config.model, **fields), attention, self.config.moe)
        made.start(self.config.seed)
        return made

    def place(self, model: Transformer) -> Transformer:
        """On the device, in the precision of the runs; the routers' bias stays fp32, as in the engine's steps."""
        model.to(self.device, self.dtype).eval()
        for router in model.routers():
            router.bias = router.bias.float()
        return model

    def random(self, lengths: tuple[int, ...], vocab: int, key: object) -> Case:
        """Uniform random tokens in documents of these lengths."""
        generator = torch.Generator().manual_seed(runtime.seed_of(self.config.seed, "gates", key))
        tokens = torch.randint(vocab, (sum(lengths),), generator=generator)
        labels = tokens.roll(-1)
        labels[torch.tensor(lengths).cumsum(0) - 1] = NO_LABEL
        return tokens.to(self.device), labels.to(self.device), Packing.from_lengths(lengths).to(self.device)

    def losses(self, model: Transformer, case: Case) -> Tensor:
        return model(*case, self.config.trainer.loss_chunk_tokens).token_losses

    def rates(self, steps: int, peak: float) -> list[float]:
        """Learning rates of so many steps by the schedule of the runs."""
        return [lr_at(step, steps, peak, self.config.schedule) for step in range(steps)]

    def train(self, model: Transformer, batches: Iterator[Case], rates: Iterable[float]) -> Iterator[float]:
        """Mean loss of each batch, a step for each learning rate, through the engine."""
        optim = self.config.optim
        model.to(self.device).train()
        settings = engine_settings(self.config.parallel, self.dtype, optim.clip, 1, 1, 1)
        engine = Engine(model, build_optimizer(model, optim), settings)
        for rate, (tokens, labels, packing) in zip(rates, batches, strict=False):
            engine.set_lr(rate)
            out = engine(tokens, labels, packing, self.config.trainer.loss_chunk_tokens)
            loss = out.token_losses.sum() / (labels != NO_LABEL).sum()
            engine.backward(loss)
            model.balance_experts(out.load)
            yield float(loss.detach())
        model.eval()


# What is looked at without training -----------------------------------------------------------------------------------


def _stirred(subject: Subject) -> Transformer:
    """A model whose every part is at work, with dense MLPs: experts' products change shape with the tokens they get."""
    model = subject.model(dense_layers=subject.config.model.layers)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator) / max(parameter.shape[-1], 4) ** 0.5
    return subject.place(model)


def _borders(subject: Subject, length: int) -> list[int]:
    """Places next to the borders of compressed blocks, selection blocks and windows."""
    a = subject.config.attention
    marks = {m for size in (a.cmp_stride, a.window) for m in range(0, length + 1, size)}
    return sorted({place for m in marks for place in (m - 1, m, m + 1) if 0 <= place < length})


def _states(model: Transformer, tokens: Tensor, packing: Packing) -> list[Tensor]:
    """Final states [T, M] and each layer's selected blocks [T, Hk, n]."""
    blocks: list[Tensor] = []
    model.keep_blocks(blocks)
    states = model.hidden(tokens, packing)[0]
    model.keep_blocks(None)
    return [states, *blocks]


@torch.no_grad()
def future_change(subject: Subject) -> Finding:
    """Another token at a border changes no state and no selection before it or in another document, to the bit."""
    model = _stirred(subject)
    length = 2 * max(subject.config.attention.selects_from, subject.config.attention.window)
    tokens, _, packing = subject.random((length, length // 4), subject.config.model.vocab, "future")
    place = torch.arange(len(tokens), device=subject.device)
    before, leaks = _states(model, tokens, packing), []
    borders = _borders(subject, length)
    for s in borders:
        other = tokens.clone()
        other[s] = (other[s] + 1) % subject.config.model.vocab
        after = _states(model, other, packing)
        kept = (place < s) | (place >= length)
        same = all(torch.equal(a[kept], b[kept]) for a, b in zip(before, after, strict=True))
        if not same or torch.equal(before[0][s], after[0][s]):
            leaks.append(s)
    shown = f" such as {leaks[0]}" if leaks else ""
    return Finding(not leaks, f"{len(leaks)} of {len(borders)} changed tokens{shown} reach others", "0, bitwise")


def later_gradient(subject: Subject) -> Finding:
    """The losses up to a token have no gradient in the embeddings of later ones, to the bit."""
    model = _stirred(subject)
    length = 2 * max(subject.config.attention.selects_from, subject.config.attention.window)
    case = subject.random((length,), subject.config.model.vocab, "gradient")
    kept: list[Tensor] = []

    def keep(module: object, inputs: object, x: Tensor) -> Tensor:
        kept.append(x.detach().requires_grad_())
        return kept[-1]

    model.embed.register_forward_hook(keep)
    places = [s - 1 for s in _borders(subject, length)[-LATE_PLACES:]]
    leaks = 0
    for t in places:
        loss = subject.losses(model, case)[: t + 1].sum()
        (gradient,) = torch.autograd.grad(loss, kept.pop())
        leaks += bool(gradient[t + 1 :].any()) or not gradient[t].any()
    return Finding(not leaks, f"{leaks} of {len(places)} places", "0, bitwise")


@torch.no_grad()
def initial_loss(subject: Subject) -> Finding:
    """An untrained model guesses. Its logits, of variance M init_std^2, add half of that to ln V."""
    model, vocab = subject.place(subject.model()), subject.config.model.vocab
    expected = subject.config.model.width * subject.config.model.init_std**2 / 2
    case = subject.random((ROW_TOKENS,) * ROWS, vocab, "initial")
    gap = float(subject.losses(model, case).sum() / (case[1] != NO_LABEL).sum()) - math.log(vocab)
    return Finding(
        abs(gap - expected) <= INITIAL_NATS, f"ln V {gap:+.4f}", f"ln V {expected:+.4f} ± {INITIAL_NATS}"
    )  # fmt: skip


# Equivalences ---------------------------------------------------------------------------------------------------------


def _only(subject: Subject, branch: str, **fields: Any) -> tuple[Transformer, Transformer]:
    """The arm with the gate of one branch open and the others shut, and full attention with the same weights."""
    arm, full = subject.model(**fields), subject.model(full=True, **fields)
    attention = subject.config.attention
    state, theirs = arm.state_dict(), full.state_dict()
    own, plain = f".kv.{kv_name(branch, attention)}.", f".kv.{OWN_KV['full']}."
    arm.load_state_dict({name: theirs.get(name.replace(own, plain), value) for name, value in state.items()})
    bias = torch.tensor([OPEN if name == branch else SHUT for name in attention.branches])
    with torch.no_grad():
        for layer in arm.layers:
            layer.attention.gate.bias.copy_(bias.repeat(subject.config.model.heads))
    return arm, full


@torch.no_grad()
def equals_full(subject: Subject, branch: str) -> Finding | None:
    """A branch that can see every token is full attention: slc up to n l' tokens, win up to w.

    Embeddings are as small as what the layers add: beside large ones attention would hardly show in the logits.
    """
    if branch not in subject.config.attention.branches:
        return None
    vocab = subject.config.model.vocab
    length = subject.config.attention.window if branch == "win" else subject.config.attention.selects_from
    tokens, _, packing = subject.random((length, length // 2 + 1), vocab, branch)
    models = _only(subject, branch, vocab=vocab, embedding_std=subject.config.model.init_std)
    ours, theirs = (subject.place(model).logits(tokens, packing).float() for model in models)
    error, bound = float((ours - theirs).norm() / theirs.norm()), RELATIVE_RMS[subject.dtype]
    return Finding(error <= bound, f"relative rms of logits {error:.1e}", f"at most {bound:g}")


def first_steps(subject: Subject) -> Finding | None:
    """With the other gates shut, slc trains like full attention on rows of n l' tokens."""
    if "slc" not in subject.config.attention.branches:
        return None
    batch = subject.random((subject.config.attention.selects_from,), subject.vocab, "first steps")
    curves = []
    for model in _only(subject, "slc", vocab=subject.vocab):
        curves.append(list(subject.train(model, _repeated(batch), subject.rates(EQUAL_STEPS, EQUAL_LR))))
    gap, bound = float(torch.tensor(curves).diff(dim=0).abs().max()), STEP_NATS[subject.dtype]  # NaN where one is
    fell = curves[1][0] - curves[1][-1]
    return Finding(
        gap <= bound, f"{gap:.1e} nats apart in {EQUAL_STEPS} steps, in which the loss fell by {fell:.2f}",
        f"at most {bound:g}",
    )  # fmt: skip


# What is trained ------------------------------------------------------------------------------------------------------


def _repeated(batch: Case) -> Iterator[Case]:
    while True:
        yield batch


def overfit(subject: Subject) -> Finding:
    """An arm that learns anything learns one batch by heart."""
    batch = subject.random((ROW_TOKENS,) * OVERFIT_ROWS, subject.vocab, "overfit")
    model, loss = subject.model(vocab=subject.vocab), math.inf
    rates = [subject.config.optim.lr] * OVERFIT_STEPS
    for step, loss in enumerate(subject.train(model, _repeated(batch), rates)):  # noqa: B007
        if loss < OVERFIT_NATS:
            break
    return Finding(loss < OVERFIT_NATS, f"{loss:.4f} nats after {step + 1} steps",
                   f"below {OVERFIT_NATS} within {OVERFIT_STEPS}")  # fmt: skip


def random_tokens(subject: Subject) -> Finding:
    """Nobody can predict uniform random tokens: a held-out loss below ln V is a leak."""
    lengths = (ROW_TOKENS,) * ROWS
    model = subject.model(vocab=subject.vocab)
    batches = (subject.random(lengths, subject.vocab, step) for step in range(subject.steps))
    for _ in subject.train(model, batches, subject.rates(subject.steps, subject.config.optim.lr)):
        pass
    with torch.no_grad():
        cases = [subject.random(lengths, subject.vocab, ("held out", i)) for i in range(HELDOUT_ROWS // ROWS)]
        losses = torch.stack([subject.losses(model, case).sum() for case in cases])
    labels = sum(int((case[1] != NO_LABEL).sum()) for case in cases)
    gap = float(losses.sum()) / labels - math.log(subject.vocab)
    enough = subject.steps >= LEAST_STEPS
    said = f"ln V {gap:+.4f} after {subject.steps} steps" + ("" if enough else ", too few to tell")
    return Finding(gap >= -LEAK_NATS and enough, said, f"at least ln V - {LEAK_NATS}, {LEAST_STEPS} steps or more")


GATES: dict[str, Callable[[Subject], Finding | None]] = {
    "future change": future_change,
    "gradient from later tokens": later_gradient,
    "initial loss": initial_loss,
    "slc is full up to n l' tokens": partial(equals_full, branch="slc"),
    "win is full up to w tokens": partial(equals_full, branch="win"),
    "first steps of slc as of full": first_steps,
    "one batch by heart": overfit,
    "random tokens": random_tokens,
}


def recipe(config: Config) -> str:
    """A hash of what gates are about: the model, its attention and experts, and the precision."""
    tree = to_tree(config)
    parts = [tree["model"], tree["attention"], tree["moe"], config.trainer.dtype]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def main(arguments: list[str]) -> int:
    """Run all gates that apply to each arm; 1 where one does not pass.

    Each arm's findings go into <out>/gates_<name>.json when it is through, in place of earlier ones of that arm.
    """
    parser = argparse.ArgumentParser(prog="nsa-train compare gates", description=__doc__)
    parser.add_argument("--arms", nargs="+", default=["full", "full_gated", "nsa"], metavar="ARM")
    parser.add_argument("--steps", type=int, default=LEAST_STEPS, help="on random tokens; fewer do not pass")
    parser.add_argument("--name", help="of the JSON; default: the experiment's")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of the JSON")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="for all arms")
    args = parser.parse_args(arguments)
    if args.steps < 1:
        raise NsaTrainError(f"--steps {args.steps} must be positive")
    configs = [load_config([*args.set, f"attention={arm}"]) for arm in args.arms]
    report = results.safe_name(args.name or configs[0].experiment)
    runtime.launch_alone()
    device, passed = runtime.device(), True
    place, source = results.device_facts()["name"], runtime.git_commit()
    path = args.out / f"gates_{report}.json"
    start_processes(device, configs[0].parallel.timeout_s)
    try:
        for config in configs:
            about = {"experiment": config.experiment, "arm": config.arm, "recipe": recipe(config)}
            rows = []
            for name, gate in GATES.items():
                started = time.perf_counter()
                finding = gate(Subject(config, device, args.steps))
                gc.collect()  # engines hold themselves in circles
                if finding:
                    seconds = time.perf_counter() - started
                    found = {"gate": name, **finding._asdict(), "seconds": seconds}
                    rows.append({**about, **found, "device": place, "commit": source})
                    passed &= finding.passed
                    verdict = "ok  " if finding.passed else "FAIL"
                    runtime.log.info(
                        "%s %-18s %-30s %s (%s), %.0f s",
                        verdict, config.arm, name, finding.found, finding.demanded, seconds,
                    )  # fmt: skip
            rows = results.with_earlier(path, rows, lambda row: (row["experiment"], row["arm"]))
            results.write_result(path.stem, "gates", rows, folder=args.out)
    finally:
        stop_processes()
    runtime.log.info("%s", path)
    return int(not passed)
