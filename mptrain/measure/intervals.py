"""95% intervals for one score and for the difference of two scores on the same examples.

One 0/1 column (accuracy, exact match), x successes of n:
    Wilson (1927): (p + z²/2n ± z·sqrt(p(1−p)/n + z²/4n²)) / (1 + z²/n)

Difference of two such columns: Tango's asymptotic score interval (1998). With b examples
only the variant gets right, c only the baseline, it holds every Δ with
    |b − c − nΔ| ≤ z·sqrt(n(2q + Δ(1−Δ))),   q the maximum likelihood P(baseline only right | Δ)
It excludes zero exactly when McNemar's test rejects, keeps its coverage where few pairs
disagree (b = c = 0 still gives a width), and never leaves [−1, 1].

Everything else (F1, loss, perplexity): percentile bootstrap over examples, seeded. Every
reduction of a Score is a function of the column means, so a resample costs its means only.
Differences resample the same examples on both sides.

All intervals treat examples as independent.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan, sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from mptrain.data.tasks.metrics import Score

Z = NormalDist().inv_cdf(0.975)
RESAMPLES = 5_000
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
    return _percentiles(_values(score, _resampled_means(score.stats, seed)))


def paired_difference(variant: Score, baseline: Score, seed: int = 0) -> Difference:
    """Difference of two scores of the same examples in the same order.

    Tango's score interval when both are 0/1, else a paired percentile bootstrap.
    Raises ValueError when the scores are not of the same metric and examples.
    """
    if (variant.name, variant.reduce, variant.n) != (baseline.name, baseline.reduce, baseline.n):
        raise ValueError(
            f"a paired difference needs one metric on the same examples, got {variant.name} with {variant.n}"
            f" and {baseline.name} with {baseline.n}"
        )
    value = variant.value - baseline.value
    both = np.hstack([variant.stats, baseline.stats])
    if variant.n == 0 or not np.isfinite(both).all():
        return Difference(value, float("nan"), float("nan"))
    if _zero_one(variant) and _zero_one(baseline):
        gain = variant.stats[:, 0] - baseline.stats[:, 0]
        return Difference(value, *tango(int((gain > 0).sum()), int((gain < 0).sum()), variant.n))
    means = _resampled_means(both, seed)
    columns = variant.stats.shape[1]
    resampled = _values(variant, means[:, :columns]) - _values(baseline, means[:, columns:])
    return Difference(value, *_percentiles(resampled))


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
    return score.reduce == "mean" and bool(np.isin(score.stats[:, 0], (0.0, 1.0)).all())


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


def _values(score: Score, means: np.ndarray) -> np.ndarray:
    return np.array([score.value_of(row[None]) for row in means])


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
