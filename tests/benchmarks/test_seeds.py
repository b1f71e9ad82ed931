"""The mean of runs with several seeds, over the reviews of all of them."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.jpqd import seeds


def test_the_mean_is_that_of_the_rows_and_its_interval_is_paired():
    generator = np.random.default_rng(0)
    dense = [(generator.random(2000) < 0.8).astype(float) for _ in range(3)]
    variants = [np.where(generator.random(2000) < 0.05, 1 - each, each) for each in dense]
    numbers = {"size_ratio": 16.0, "speedup": 9.0, "speedup_fp32": 4.0, "minutes": 10.0}
    rows = [numbers, numbers, numbers | {"speedup": 12.0}]
    found = seeds.mean(rows, variants, dense)
    value, low, high = found["delta"]
    assert value == pytest.approx(np.mean([v.mean() - d.mean() for v, d in zip(variants, dense)]))
    assert low < value < high and high - low < 0.03  # unpaired, 3 seeds of 2,000 reviews: 0.036
    assert found["speedup"] == pytest.approx(10.0) and found["n"] == 2000
