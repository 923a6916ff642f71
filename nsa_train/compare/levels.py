"""The level that a comparison reaches, by a rule fixed before any run: gates first, then NSA against its baselines.

Primary endpoint: held-out loss at the end of training, nsa minus full, on text. Secondary ones, corrected by Holm, are
on text, too: no endpoint counts documents of synthetic sources (kind `recall`), most of whose tokens are drawn at
random and which weigh more in the held-out split than in training. Beside them the report has the loss over everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from nsa_train.compare.cuts import TEXT, far_cut, find
from nsa_train.compare.runs import BASELINE, NSA
from nsa_train.compare.statistics import Difference, holm
from nsa_train.config.schema import AttentionConfig

LEAST_SEEDS = 3  # for L2 and L3
MATCH_NATS = 0.01  # L1: how much worse may still be called equal
GATED, WIDE = "full_gated", "full_gated_wide"


class Level(NamedTuple):
    """passed counts by itself; a level is reached when those before it are passed too."""

    name: str
    title: str
    rule: str
    passed: bool
    why: str


def levels(differences: Sequence[Difference], arms: Sequence[str], gates: Sequence[dict[str, Any]]) -> list[Level]:
    """L0 to L3. `gates` are the rows of `nsa-train compare gates`; L0 needs them for each of the compared arms."""
    failed = [f"{gate['arm']}: {gate['gate']}" for gate in gates if not gate["passed"]]
    unseen = [arm for arm in arms if arm not in {gate["arm"] for gate in gates}]
    said = f"not run for {', '.join(unseen)}" if unseen else f"all {len(gates)} passed"
    against_full = find(differences, NSA, BASELINE)
    bound = against_full.upper if against_full else None
    gated, wide = (find(differences, NSA, control) for control in (GATED, WIDE))
    controls = [gated] if wide is None or len(wide.seeds) < LEAST_SEEDS else [gated, wide]
    return [
        Level("L0", "gates passed", "every gate passes for every arm", not unseen and not failed,
              f"failed: {', '.join(failed)}" if failed else said),
        Level(
            "L1", "matches", f"upper end of the one-sided 95% interval of nsa - full on text is at most +{MATCH_NATS}",
            bound is not None and bound <= MATCH_NATS,
            "needs two seeds of nsa and full" if bound is None else f"upper end {bound:+.4f}",
        ),
        Level(
            "L2", "reproduced",
            f"two-sided 95% interval of nsa - full on text lies below 0, with at least {LEAST_SEEDS} seeds",
            _below_zero(against_full), _interval(against_full, BASELINE),
        ),
        Level(
            "L3", "due to sparsity",
            f"the same against {GATED}, and against {WIDE} where it has {LEAST_SEEDS} seeds",
            all(map(_below_zero, controls)),
            "; ".join([_interval(d, d.baseline if d else GATED) for d in controls] + _untested(wide)),
        ),
    ]  # fmt: skip


def reached(ladder: Sequence[Level]) -> Level | None:
    """The last level before the first that is not passed."""
    last = None
    for level in ladder:
        if not level.passed:
            break
        last = level
    return last


class Endpoint(NamedTuple):
    """One that is not the primary one; mean is None without runs, p and p_holm with fewer than two seeds."""

    arm: str
    baseline: str
    cut: str
    mean: float | None
    p: float | None
    p_holm: float | None


def secondary(differences: Sequence[Difference], attention: AttentionConfig) -> list[Endpoint]:
    """Gates, choosing, recall beyond the window, with p-values by Holm.

    The family is these three, whatever was run: one that could not be tested counts as one that found nothing.
    """
    asked = ((GATED, TEXT), ("nsa_random", far_cut("position", attention)), ("window", far_cut("recall", attention)))
    found = [find(differences, NSA, baseline, cut) for baseline, cut in asked]
    p = [d.p if d else None for d in found]
    corrected = holm([1.0 if one is None else one for one in p])
    return [
        Endpoint(NSA, *question, d.mean if d else None, one, None if one is None else holms)
        for question, d, one, holms in zip(asked, found, p, corrected, strict=True)
    ]


def _below_zero(d: Difference | None) -> bool:
    return d is not None and len(d.seeds) >= LEAST_SEEDS and d.high is not None and d.high < 0


def _interval(d: Difference | None, baseline: str) -> str:
    if d is None or d.low is None:
        return f"needs {LEAST_SEEDS} seeds of nsa and {baseline}"
    return f"nsa - {baseline}: {d.mean:+.4f}, {d.low:+.4f} to {d.high:+.4f}, {len(d.seeds)} seeds"


def _untested(wide: Difference | None) -> list[str]:
    """What is to be said of the widened control where it does not count."""
    if wide is None:
        return [f"{WIDE}: not tested"]
    seeds = len(wide.seeds)
    mean = f"nsa - {WIDE}: {wide.mean:+.4f}, {seeds} seed{'s' * (seeds > 1)}"
    return [f"{WIDE}: not tested ({mean})"] if seeds < LEAST_SEEDS else []
