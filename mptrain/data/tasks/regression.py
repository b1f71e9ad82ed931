"""A number for a text, or for a pair of texts: a rating, a price, how alike two sentences are.

The model has one output and is trained by the squared error. Scores on n rows, of predictions p and values y:

    mae = mean |p − y|       mse = mean (p − y)²
    pearson = cov(p, y) / (σ_p σ_y)          spearman = pearson of the ranks

A model that says the same for every row has no correlation.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.functional import mse_loss

from mptrain.core.errors import DataError
from mptrain.core.signature import BATCH, Batch, Outputs, Port
from mptrain.data.sources.tables import Table
from mptrain.data.tasks.agreement import array, closeness
from mptrain.data.tasks.base import finite
from mptrain.data.tasks.divergence import same_shape
from mptrain.data.tasks.floor import tfidf_numbers
from mptrain.data.tasks.metrics import MEAN, Measure, Score
from mptrain.data.tasks.text_task import TextTask
from mptrain.recipe import TASKS

log = logging.getLogger(__name__)


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


def correlations(p: np.ndarray, y: np.ndarray) -> dict[str, Score]:
    """Both as scores, of predictions and values [n]."""
    a, b = p - y.mean(), y - y.mean()  # means near zero, so that their products keep their digits
    products = np.stack([a, b, a * b, a * a, b * b], axis=1)
    return {
        "pearson": Score("pearson", products, PEARSON, "coefficient"),
        "spearman": Score("spearman", np.stack([p, y], axis=1), SPEARMAN, "coefficient"),
    }


class Regression(TextTask):
    """Scores are the mean absolute error, the mean squared error, Pearson's and Spearman's correlation."""

    kind = TASKS["regression"]
    measures = {m.name: m for m in (PEARSON, SPEARMAN)}

    def index_labels(self, tables: Mapping[str, Table]) -> list[str]:
        facts = {}
        for split, table in tables.items():
            values = [number(cell, table, "label", row) for row, cell in enumerate(table["label"])]
            table.columns["label"] = values
            spread = {"mean": float(np.mean(values)), "std": float(np.std(values))}
            spread |= {"min": min(values), "max": max(values)}
            facts[split] = {name: round(value, 6) for name, value in spread.items()}
        train = facts["train"]
        if train["min"] == train["max"]:
            raise DataError(
                f"data.label ({tables['train'].where}): every row has the value {train['min']:g}, so there is nothing"
                " to learn. Set data.label to the column with the numbers."
            )
        if abs(train["mean"]) > 20 or not 0.05 < train["std"] < 20:
            log.warning(
                "data.label: values have mean %.4g and standard deviation %.4g; a head begins near 0 and moves by the"
                " learning rate, so it learns faster from values that are shifted and scaled to a few units",
                train["mean"],
                train["std"],
            )
        self.facts["values"] = facts
        self._targets: dict[str, np.ndarray] = {}
        return [self.spec.columns.get("label", "label")]

    def targets(self, split: str, table: Table) -> Sequence[float]:
        self._targets[split] = np.asarray(table["label"], dtype=np.float64)
        return table["label"]

    def outputs(self) -> tuple[Port, ...]:
        return (Port("logits", (BATCH, 1)),)

    def read(self, outputs: Outputs, batch: Batch, split: str, indices: Sequence[int]) -> list[float]:
        return list(finite(outputs)[:, 0])

    def score(self, split: str, found: list[float]) -> list[Score]:
        return _scores(np.array(found, dtype=np.float64), self._targets[split])

    @classmethod
    def agreement(cls, expected: Outputs, got: Outputs, batch: Batch) -> np.ndarray:
        """1 − the difference in standard deviations of the batch, not below 0."""
        ours, theirs = (array(outputs["logits"])[:, 0].astype(np.float64) for outputs in (expected, got))
        return closeness(ours, theirs)

    def distillation(
        self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor], temperature: float
    ) -> Tensor:
        """The squared error to what the teacher says; numbers have no temperature."""
        same_shape("logits", student["logits"], teacher["logits"])
        return mse_loss(student["logits"].float(), teacher["logits"].float())

    def floor(self, seed: int) -> Score | None:
        found = tfidf_numbers(self.texts, seed)
        return None if found is None else _scores(found, self._targets["test"])[0]


def _scores(found: np.ndarray, targets: np.ndarray) -> list[Score]:
    error = (found - targets)[:, None]
    return [
        Score("mae", np.abs(error), MEAN, "number", higher_is_better=False),
        Score("mse", error**2, MEAN, "number", higher_is_better=False),
        *correlations(found, targets).values(),
    ]


def number(cell: Any, table: Table, field: str, row: int) -> float:
    """The number in a cell, which in a csv is text. Raises DataError naming the row."""
    try:
        value = float(cell) if isinstance(cell, str | int | float) and not isinstance(cell, bool) else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(
            f"{table.place(field, row)} holds {cell!r} where a number is needed (with a point: 3.5). Correct or drop"
            f" the row, or set data.{field} to the column with the numbers."
        )
    return value
