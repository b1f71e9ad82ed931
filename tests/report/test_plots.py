"""Figures: deterministic, thinned, coloured by the page."""

from __future__ import annotations

import re

import numpy as np
import pytest
from kit import report_sample as sample

from mptrain.report.render.plots import POINTS, plots, thin


@pytest.fixture(scope="module")
def report():
    return sample.report()


def test_plots_are_deterministic_and_thinned():
    long = sample.report(history=sample.history(steps=4000))
    first, second = plots(long), plots(long)
    assert first == second
    losses = next(plot for plot in first if plot.key == "losses")
    assert max(path.count("L ") for path in re.findall(r' d="([^"]*)"', losses.svg)) <= POINTS
    assert len(losses.svg) < 100_000


def test_thinning_keeps_means_and_order():
    xs, ys = thin(range(1, 1001), [2.0 * x for x in range(1, 1001)], limit=100)
    assert len(xs) == len(ys) == 100
    np.testing.assert_allclose(ys, 2 * xs)
    assert xs[0] == 5.5 and (np.diff(xs) == 10).all()
    few = thin([1, 2], [3, 4])
    np.testing.assert_array_equal(few, ([1, 2], [3, 4]))


def test_plots_use_page_colours_only(report):
    for plot in plots(report):
        assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", plot.svg)) <= {"none"} | {
            f"var(--{name})" for name in ("ink", "muted", "line", "c1", "c2", "c3", "c4", "c5", "c6")
        }


def test_latency_is_drawn_against_length_where_three_lengths_were_measured(report):
    assert "lengths" not in [plot.key for plot in plots(report)]
    lengths = [8, 32, 128]
    times = {f"b1_s{n}_t1": {"median": n / 10, "min": n / 10, "runs": 5} for n in lengths}
    variants = [{**v, "latency_ms": times if i else {}} for i, v in enumerate(report["variants"])]
    latency = {**report["recipe"]["evaluate"]["latency"], "batch": [1], "length": lengths, "threads": [1]}
    evaluate = {**report["recipe"]["evaluate"], "latency": latency}
    changed = {**report, "variants": variants, "recipe": {**report["recipe"], "evaluate": evaluate}}
    drawn = next(plot for plot in plots(changed) if plot.key == "lengths")
    assert "Length (tokens)" in drawn.svg and variants[1]["id"] in drawn.svg
