"""95% intervals for one score and for the difference of two scores on the same examples.

One 0/1 column (accuracy, exact match), x successes of n:
    Wilson (1927): (p + z²/2n ± z·sqrt(p(1−p)/n + z²/4n²)) / (1 + z²/n)

Difference of two such columns: Tango's asymptotic score interval (1998). With b examples
only the variant gets right, c only the baseline, it holds every Δ with
    |b − c − nΔ| ≤ z·sqrt(n(2q + Δ(1−Δ))),   q the maximum likelihood P(baseline only right | Δ)
It excludes zero exactly when McNemar's test rejects, keeps its coverage where few pairs
disagree (b = c = 0 still gives a width), and never leaves [−1, 1].

Everything else (F1, loss, AUC, a correlation): percentile bootstrap over examples, seeded. Where a
measure is a function of the column means, a resample costs its means only; one of all rows is computed
anew, of fewer resamples the more rows there are. Differences resample the same examples on both sides.

All intervals treat examples as independent.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan, sqrt
from statistics import NormalDist
from typing import Literal

import numpy as np

from mptrain.data.tasks.metrics import MEAN, Score

Z = NormalDist().inv_cdf(0.975)
RESAMPLES = 5_000
WHOLE_RESAMPLES = (200, 1_000)
"""least and most resamples of a measure that is computed of all rows"""
_WHOLE_ROWS = 20_000_000  # rows in all resamples of such a measure: bounds the time
_CHUNK = 2_000_000  # gathered rows at a time: bounds the memory, not the result


@dataclass(frozen=True)
class Difference:
    """variant − baseline in units of the score, with its paired 95% interval."""

    value: float
    low: float
    high: float

    def verdict(self, higher_is_better: bool) -> Literal["better", "worse", "tied"] | None:
        """Whether the interval excludes zero, and on which side; None when it is not a number."""
        if isnan(self.low) or isnan(self.high):
            return None
        if self.low > 0:
            return "better" if higher_is_better else "worse"
        if self.high < 0:
            return "worse" if higher_is_better else "better"
        return "tied"


def interval(score: Score, seed: int = 0) -> tuple[float, float]:
    """95% interval of `score.value`: Wilson for 0/1 examples, else percentile bootstrap."""
    if _zero_one(score):
        return wilson(int(score.stats[:, 0].sum()), score.n)
    if score.n == 0 or not np.isfinite(score.stats).all():
        return float("nan"), float("nan")
    (values,) = _resampled(seed, score)
    return _percentiles(values)


def paired_difference(variant: Score, baseline: Score, seed: int = 0) -> Difference:
    """Difference of two scores of the same examples in the same order.

    Tango's score interval when both are 0/1, else a paired percentile bootstrap.
    Raises ValueError when the scores are not of the same metric and examples.
    """
    if (variant.name, variant.of.name, variant.n) != (baseline.name, baseline.of.name, baseline.n):
        raise ValueError(
            f"a paired difference needs one metric on the same examples, got {variant.name} with {variant.n}"
            f" and {baseline.name} with {baseline.n}"
        )
    value = variant.value - baseline.value
    if variant.n == 0 or not (np.isfinite(variant.stats).all() and np.isfinite(baseline.stats).all()):
        return Difference(value, float("nan"), float("nan"))
    if _zero_one(variant) and _zero_one(baseline):
        gain = variant.stats[:, 0] - baseline.stats[:, 0]
        return Difference(value, *tango(int((gain > 0).sum()), int((gain < 0).sum()), variant.n))
    ours, theirs = _resampled(seed, variant, baseline)
    return Difference(value, *_percentiles(ours - theirs))


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95% interval of a proportion; (nan, nan) without examples."""
    if n == 0:
        return float("nan"), float("nan")
    p = successes / n
    centre = p + Z * Z / (2 * n)
    half = Z * sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    # The exact limits at p = 0 and p = 1 are 0 and 1; rounding must not miss them.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def tango(b: int, c: int, n: int) -> tuple[float, float]:
    """95% interval of (b − c)/n; b and c count the examples only one side gets right."""

    def outside(delta: float) -> bool:
        linear = (2 * n - b + c) * delta - b - c
        q = (sqrt(max(0.0, linear * linear + 8 * n * c * delta * (1 - delta))) - linear) / (4 * n)
        variance = n * max(0.0, 2 * q + delta * (1 - delta))
        return (b - c - n * delta) ** 2 > Z * Z * variance

    def limit(end: float) -> float:
        inner, outer = (b - c) / n, end
        for _ in range(60):
            middle = (inner + outer) / 2
            inner, outer = (inner, middle) if outside(middle) else (middle, outer)
        return inner

    return limit(-1.0), limit(1.0)


def _zero_one(score: Score) -> bool:
    return score.of is MEAN and bool(np.isin(score.stats[:, 0], (0.0, 1.0)).all())


def _resampled_means(stats: np.ndarray, seed: int) -> np.ndarray:
    """Column means [RESAMPLES, k] of examples [n, k] drawn with replacement."""
    n = len(stats)
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // n)
    means = [
        stats[rng.integers(0, n, size=(min(chunk, RESAMPLES - done), n))].mean(axis=1)
        for done in range(0, RESAMPLES, chunk)
    ]
    return np.concatenate(means)


def _resampled(seed: int, *scores: Score) -> list[np.ndarray]:
    """The values of each score on resamples, of the same examples for all of them."""
    if not scores[0].of.whole:
        means = _resampled_means(np.hstack([score.stats for score in scores]), seed)
        ends = np.cumsum([score.stats.shape[1] for score in scores])[:-1]
        parts = np.split(means, ends, axis=1)
        return [np.array([score.of.of(row) for row in part]) for score, part in zip(scores, parts)]
    n, rng = scores[0].n, np.random.default_rng(seed)
    least, most = WHOLE_RESAMPLES
    draws = [rng.integers(0, n, size=n) for _ in range(max(least, min(most, _WHOLE_ROWS // n)))]
    return [np.array([score.of(score.stats[rows]) for rows in draws]) for score in scores]


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    """Of the resamples that have a value: a resample of one class alone has no AUC."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
