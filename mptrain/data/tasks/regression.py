"""A number for a text, or for a pair of texts: a rating, a price, how alike two sentences are.

The model has one output and is trained by the squared error. Scores on n rows, of predictions p and values y:

    mae = mean |p − y|       mse = mean (p − y)²
    pearson = cov(p, y) / (σ_p σ_y)          spearman = pearson of the ranks

A model that says the same for every row has no correlation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor
from torch.nn.functional import mse_loss

from mptrain.core.errors import DataError
from mptrain.core.signature import BATCH, Batch, Outputs, Port
from mptrain.data.sources.tables import Table
from mptrain.data.tasks.agreement import array, closeness
from mptrain.data.tasks.arrays import finite
from mptrain.data.tasks.divergence import same_shape
from mptrain.data.tasks.floor import tfidf_numbers
from mptrain.data.tasks.metrics import MEAN, Score
from mptrain.data.tasks.numbers import CORRELATIONS, correlations, number
from mptrain.data.tasks.text_task import TextTask
from mptrain.recipe import TASKS

log = logging.getLogger(__name__)


class Regression(TextTask):
    """Scores are the mean absolute error, the mean squared error, Pearson's and Spearman's correlation."""

    kind = TASKS["regression"]
    measures = CORRELATIONS

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
