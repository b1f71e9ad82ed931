"""Intervals against scipy, brute force, a published example and exact coverage."""

from __future__ import annotations

from math import comb, nan, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from mptrain.data.tasks.metrics import EXP_RATIO, F1, MEAN, RATIO, Score
from mptrain.measure import intervals
from mptrain.measure.intervals import Difference, interval, paired_difference, tango, wilson


def zero_one(hits: np.ndarray) -> Score:
    return Score("accuracy", hits.astype(np.float64)[:, None], MEAN)


def entity_f1(rng: np.random.Generator, n: int) -> Score:
    return Score("f1", rng.poisson((2.0, 0.6, 0.8), size=(n, 3)).astype(float), F1)


def perplexity(rng: np.random.Generator, n: int) -> Score:
    tokens = rng.integers(5, 60, n).astype(float)
    return Score("perplexity", np.stack([tokens * rng.normal(3, 0.4, n), tokens], 1), EXP_RATIO, "number", False)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (1, 7), (83, 100), (2100, 2553)])
def test_wilson_is_scipys(right, n):
    reference = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right, n) == pytest.approx((reference.low, reference.high), abs=1e-12)
    hits = np.arange(n) < right
    assert interval(zero_one(hits)) == wilson(right, n)


def test_tango_gives_the_published_interval():
    # Airway reactivity, 21 children (Bentur et al. 2009), as in Fagerland, Lydersen and Laake (2014).
    low, high = tango(1, 7, 21)
    assert (round(low, 3), round(high, 3)) == (-0.517, -0.026)


@pytest.mark.parametrize(("b", "c", "n"), [(40, 20, 160), (3, 9, 50), (12, 12, 400), (5, 0, 30)])
def test_tango_inverts_the_score_test_with_a_numerical_likelihood(b, c, n):
    def statistic(delta: float) -> float:
        """(b − c − nΔ) over its standard deviation at the maximum of the trinomial likelihood given Δ."""

        def loss(q: float) -> float:
            p = q + delta
            terms = ((b, p), (c, q), (n - b - c, 1 - p - q))
            return -sum(count * np.log(max(prob, 1e-300)) for count, prob in terms if count)

        low, high = max(0.0, -delta), (1 - delta) / 2
        q = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-13}).x
        return (b - c - n * delta) / sqrt(n * (2 * q + delta - delta**2))

    for limit, expected in zip(tango(b, c, n), (intervals.Z, -intervals.Z), strict=True):
        assert statistic(limit) == pytest.approx(expected, abs=2e-4)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 400))
def test_tango_agrees_with_mcnemar_and_keeps_its_range(b, c, agree):
    n = b + c + agree
    low, high = tango(b, c, n)
    assert -1 <= low <= (b - c) / n <= high <= 1
    assert low < high
    assert tango(c, b, n) == pytest.approx((-high, -low), abs=1e-12)
    mcnemar = abs(b - c) / sqrt(b + c) if b + c else 0.0
    if abs(mcnemar - intervals.Z) > 1e-9:
        assert (low > 0 or high < 0) == (mcnemar > intervals.Z)


@pytest.mark.parametrize(("p", "q"), [(0.02, 0.02), (0.05, 0.1), (0.2, 0.2), (0.3, 0.1), (0.01, 0.0)])
def test_tango_covers_the_truth(p, q):
    """Exact coverage over all outcomes of 40 pairs."""
    n, covered = 40, 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            chance = comb(n, b) * comb(n - b, c) * p**b * q**c * (1 - p - q) ** (n - b - c)
            if chance > 1e-9:
                low, high = tango(b, c, n)
                covered += chance * (low <= p - q <= high)
    assert covered > 0.93


@pytest.mark.parametrize("make", [entity_f1, perplexity])
def test_bootstrap_is_that_of_resampled_examples(make, monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 200)
    score = make(np.random.default_rng(3), 60)
    rng = np.random.default_rng(7)
    resampled = [score.of(score.stats[rng.integers(0, 60, 60)]) for _ in range(200)]
    assert interval(score, seed=7) == pytest.approx(tuple(np.percentile(resampled, [2.5, 97.5])), rel=1e-12)


def test_bootstrap_agrees_with_scipys():
    values = np.random.default_rng(0).exponential(size=300)
    score = Score("loss", np.stack([values, np.ones(300)], 1), RATIO, "number", False)
    reference = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, random_state=1
    ).confidence_interval
    assert interval(score) == pytest.approx((reference.low, reference.high), abs=0.01)


def test_chunks_do_not_change_the_result(monkeypatch):
    score = entity_f1(np.random.default_rng(1), 97)
    whole = interval(score)
    monkeypatch.setattr(intervals, "_CHUNK", 1000)
    assert interval(score) == whole


@pytest.mark.parametrize("make", [entity_f1, perplexity])
def test_paired_bootstrap_resamples_both_sides_alike(make, monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 150)
    rng = np.random.default_rng(5)
    base = make(rng, 80)
    variant = Score(base.name, base.stats * rng.uniform(0.95, 1.1, base.stats.shape), base.of)
    rng = np.random.default_rng(2)
    rows = [rng.integers(0, 80, 80) for _ in range(150)]
    resampled = [variant.of(variant.stats[r]) - base.of(base.stats[r]) for r in rows]
    found = paired_difference(variant, base, seed=2)
    assert found.value == pytest.approx(variant.value - base.value)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(resampled, [2.5, 97.5])), rel=1e-9)


def test_pairing_narrows_the_interval_and_equal_models_tie():
    rng = np.random.default_rng(0)
    base = zero_one(rng.random(2000) < 0.8)
    flipped = base.stats[:, 0].copy()
    flipped[:20] = 1 - flipped[:20]
    found = paired_difference(zero_one(flipped), base)
    low, high = interval(base)
    assert found.high - found.low < (high - low) / 2
    same = paired_difference(base, base)
    assert same.value == 0 and same.low < 0 < same.high and same.verdict(True) == "tied"


def test_perplexity_of_the_same_model_ties_exactly():
    score = perplexity(np.random.default_rng(0), 50)
    found = paired_difference(score, score)
    assert (found.value, found.low, found.high) == (0, 0, 0)
    assert found.verdict(False) == "tied"


@pytest.mark.parametrize(
    ("low", "high", "higher", "verdict"),
    [
        (0.1, 0.2, True, "better"),
        (0.1, 0.2, False, "worse"),
        (-0.2, -0.1, True, "worse"),
        (-0.2, -0.1, False, "better"),
        (-0.1, 0.1, True, "tied"),
        (0.0, 0.1, True, "tied"),
        (nan, nan, True, None),
    ],
)
def test_verdict(low, high, higher, verdict):
    assert Difference(0.0, low, high).verdict(higher) == verdict


def test_what_is_not_a_number_has_no_interval():
    broken = Score("perplexity", np.array([[nan, 1.0], [2.0, 1.0]]), EXP_RATIO, "number", False)
    assert np.isnan(interval(broken)).all()
    assert paired_difference(broken, broken).verdict(False) is None
    assert np.isnan(interval(zero_one(np.zeros(0)))).all()


def test_different_examples_are_refused():
    with pytest.raises(ValueError, match="accuracy with 3 and accuracy with 4"):
        paired_difference(zero_one(np.ones(3)), zero_one(np.ones(4)))
