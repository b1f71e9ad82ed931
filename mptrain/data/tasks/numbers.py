"""Columns of numbers, and how predictions go with them.

    pearson = cov(p, y) / (σ_p σ_y)          spearman = pearson of the ranks

A model that says the same for every row has no correlation.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.stats import rankdata

from mptrain.core.errors import DataError
from mptrain.data.sources.quoting import shown
from mptrain.data.sources.tables import Table
from mptrain.data.tasks.metrics import Measure, Score

_ROUNDING = 1e-13  # a variance of so much of the mean square is that of a constant


def _pearson(mean: np.ndarray) -> float:
    """Of the means of p, y, py, pp, yy."""
    p, y, py, pp, yy = mean
    ours, theirs = pp - p * p, yy - y * y
    if ours <= _ROUNDING * pp or theirs <= _ROUNDING * yy:
        return float("nan")
    return float((py - p * y) / math.sqrt(ours * theirs))


def _spearman(rows: np.ndarray) -> float:
    return correlation(rankdata(rows[:, 0]), rankdata(rows[:, 1]))


def correlation(p: np.ndarray, y: np.ndarray) -> float:
    """Pearson's of two vectors [n]; nan where one is constant."""
    p, y = p - p.mean(), y - y.mean()
    spread = math.sqrt(float(p @ p) * float(y @ y))
    return float(p @ y) / spread if spread > 0 else float("nan")


PEARSON = Measure("pearson", _pearson)
SPEARMAN = Measure("spearman", _spearman, whole=True)
CORRELATIONS = {measure.name: measure for measure in (PEARSON, SPEARMAN)}


def correlations(p: np.ndarray, y: np.ndarray) -> dict[str, Score]:
    """Both as scores, of predictions and values [n]."""
    a, b = p - y.mean(), y - y.mean()  # means near zero, so that their products keep their digits
    products = np.stack([a, b, a * b, a * a, b * b], axis=1)
    return {
        "pearson": Score("pearson", products, PEARSON, "coefficient"),
        "spearman": Score("spearman", np.stack([p, y], axis=1), SPEARMAN, "coefficient"),
    }


def number(cell: Any, table: Table, field: str, row: int) -> float:
    """The number in a cell, which in a csv is text. Raises DataError naming the row."""
    try:
        value = float(cell) if isinstance(cell, str | int | float) and not isinstance(cell, bool) else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(
            f"{table.place(field, row)} holds {shown(cell)} where a number is needed (with a point: 3.5). Correct or"
            f" drop the row, or set data.{field} to the column with the numbers."
        )
    return value
