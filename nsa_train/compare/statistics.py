"""Paired differences of held-out losses and how sure they are: Student's t over seeds, a bootstrap over documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000
RESAMPLES_AT_ONCE = 250  # documents x this many weights lie in memory
CONFIDENCE = 0.95


def t_within(t: float, freedom: int) -> float:
    """P(|T| < t) of Student's t with whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    theta = math.atan(t / math.sqrt(freedom))
    square, odd = math.cos(theta) ** 2, freedom % 2
    term, series = (math.cos(theta) if odd else 1.0), 0.0
    for i in range(1 + odd, freedom, 2):
        series += term
        term *= square * i / (i + 1)
    return 2 / math.pi * (theta + math.sin(theta) * series) if odd else math.sin(theta) * series


def t_quantile(within: float, freedom: int) -> float:
    """The t for which P(|T| < t) = within, 0 <= within < 1."""
    low, high = 0.0, 1.0
    while t_within(high, freedom) < within:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < within else (low, middle)
    return high


@dataclass(frozen=True)
class Difference:
    """Loss of `arm` minus loss of `baseline`, nats per token, on the labels of `cut`; negative: `arm` is better.

    per_seed  difference of each seed, both arms on the same rows, from the same common weights
    se_data   standard error from the choice of documents: cluster bootstrap; None with a single document
    se        sqrt(var(per_seed) / seeds + se_data^2); None with a single seed
    low high  two-sided 95% interval, mean +- t se with seeds - 1 degrees of freedom
    upper     end of the one-sided 95% interval
    p         two-sided, that the true difference is 0
    """

    arm: str
    baseline: str
    cut: str
    seeds: tuple[int, ...]
    per_seed: tuple[float, ...]
    mean: float
    se_data: float | None
    se: float | None = None
    low: float | None = None
    high: float | None = None
    upper: float | None = None
    p: float | None = None

    @staticmethod
    def of(arm: str, baseline: str, cut: str, per_seed: dict[int, float], se_data: float | None) -> Difference:
        seeds, values = tuple(per_seed), tuple(per_seed.values())
        mean, freedom = sum(values) / len(values), len(values) - 1
        if not freedom:
            return Difference(arm, baseline, cut, seeds, values, mean, se_data)
        variance = sum((d - mean) ** 2 for d in values) / freedom
        se = math.sqrt(variance / len(values) + (se_data or 0.0) ** 2)
        half = t_quantile(CONFIDENCE, freedom) * se
        upper = mean + t_quantile(2 * CONFIDENCE - 1, freedom) * se
        p = 1 - t_within(abs(mean) / se, freedom) if se else float(mean == 0)
        return Difference(arm, baseline, cut, seeds, values, mean, se_data, se, mean - half, mean + half, upper, p)


@dataclass(frozen=True)
class Pair:
    """One arm beside another, with a pair of runs for each seed.

    losses  {seed: ([N, K], [N, K])}  summed loss of each document in each of K cuts, of the arm and of its baseline
    labels  {seed: [N, K]}            their labels, which both arms share
    """

    arm: str
    baseline: str
    losses: dict[int, tuple[np.ndarray, np.ndarray]]
    labels: dict[int, np.ndarray]


def differences(pairs: Sequence[Pair], cuts: Sequence[str], documents: int) -> list[Difference]:
    """Every pair in every cut in which each of its seeds has labels. All use the same resamples of the documents."""
    gaps = [pair.losses[seed][0] - pair.losses[seed][1] for pair in pairs for seed in pair.losses]
    counts = [pair.labels[seed] for pair in pairs for seed in pair.losses]
    if not gaps:
        return []
    gap, count = (np.stack(some, 1) for some in (gaps, counts))  # [N, pairs x seeds, K]
    whole = _ratio(gap.sum(0), count.sum(0))  # [pairs x seeds, K]
    owner = np.repeat(np.arange(len(pairs)), [len(pair.losses) for pair in pairs])
    means = np.stack([
        np.stack([sample[owner == i].mean(0) for i in range(len(pairs))]) for sample in _resampled(gap, count)
    ])  # [resamples, pairs, K]  # fmt: skip
    found = []
    for i, pair in enumerate(pairs):
        for k, cut in enumerate(cuts):
            values = whole[owner == i, k].tolist()
            if any(math.isnan(value) for value in values):
                continue
            drawn = means[:, i, k][~np.isnan(means[:, i, k])]  # a draw may miss all documents of a rare cut
            several = (count[:, owner == i, k].sum(1) > 0).sum() > 1
            se_data = float(drawn.std(ddof=1)) if several and documents > 1 else None
            per_seed = dict(zip(pair.losses, values, strict=True))
            found.append(Difference.of(pair.arm, pair.baseline, cut, per_seed, se_data))
    return found


def _ratio(loss: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.divide(loss, labels, out=np.full(loss.shape, np.nan), where=labels > 0)


def _resampled(gap: np.ndarray, count: np.ndarray):
    """Mean difference per label in RESAMPLES draws of N documents with replacement: each [pairs x seeds, K]."""
    N, *shape = gap.shape
    draw = np.random.default_rng(0)  # the same for every report of the same runs
    for at in range(0, RESAMPLES, RESAMPLES_AT_ONCE):
        size = min(RESAMPLES_AT_ONCE, RESAMPLES - at)
        weights = np.stack([np.bincount(draw.integers(N, size=N), minlength=N) for _ in range(size)]).astype(float)
        sums = ((weights @ some.reshape(N, -1)).reshape(size, *shape) for some in (gap, count))
        yield from _ratio(*sums)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: p-values that stay below 0.05 in all but 5% of cases in which no difference is real."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds; one seed has none."""
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else None
    return {"mean": mean, "sd": deviation}
