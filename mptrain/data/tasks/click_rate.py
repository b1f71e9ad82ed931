"""How likely a click is: a text, or a pair of texts (who is asked, what is offered), and whether it was clicked.

The model has one output, whose sigmoid is the probability, and is trained by the log loss. Scores on n rows, of
probabilities p, clicks y in {0, 1} and the ranks r of the outputs (the mean rank of equal ones):

    log_loss = mean −y·ln p − (1 − y)·ln(1 − p)
    auc = (Σ_{y=1} r − k(k + 1) / 2) / (k·(n − k)),  k clicks          (Mann and Whitney 1947)

AUC is the share of pairs of a click and none that the model puts in order; without one of either there is none. The
loss is taken from the logits, so that a certain answer that is wrong costs what it should and not infinity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from mptrain.core.errors import DataError
from mptrain.core.signature import BATCH, Batch, Outputs, Port
from mptrain.data.sources.quoting import shown
from mptrain.data.sources.tables import Table
from mptrain.data.tasks.arrays import finite
from mptrain.data.tasks.divergence import bernoulli
from mptrain.data.tasks.floor import tfidf_labels
from mptrain.data.tasks.metrics import MEAN, Measure, Score
from mptrain.data.tasks.text_task import TextTask
from mptrain.recipe import TASKS

_BITS = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}


def _auc(rows: np.ndarray) -> float:
    """Of [n, 2] logits and clicks."""
    clicks = rows[:, 1] > 0.5
    k, n = int(clicks.sum()), len(rows)
    if k in (0, n):
        return float("nan")
    return float((rankdata(rows[:, 0])[clicks].sum() - k * (k + 1) / 2) / (k * (n - k)))


AUC = Measure("auc", _auc, whole=True)


class ClickRate(TextTask):
    """Scores are the log loss and the area under the ROC curve."""

    kind = TASKS["click-rate"]
    measures = {AUC.name: AUC}

    def index_labels(self, tables: Mapping[str, Table]) -> list[str]:
        rates = {}
        for split, table in tables.items():
            for field in (name for name in self.inputs() if name in table.columns):
                _check_whole(table, field)
            table.columns["label"] = [_click(cell, table, row) for row, cell in enumerate(table["label"])]
            rates[split] = round(float(np.mean(table["label"])), 6)
        if rates["train"] in (0.0, 1.0):
            what = "nothing was clicked" if rates["train"] == 0 else "everything was clicked"
            raise DataError(
                f"data.label ({tables['train'].where}): {what}, so there is nothing to learn. Set data.label to the"
                " column that says what was, with 0 and 1."
            )
        self.facts["click_rate"] = rates
        self._clicks: dict[str, np.ndarray] = {}
        return [self.spec.columns.get("label", "label")]

    def targets(self, split: str, table: Table) -> Sequence[float]:
        self._clicks[split] = np.asarray(table["label"], dtype=np.float64)
        return table["label"]

    def outputs(self) -> tuple[Port, ...]:
        return (Port("logits", (BATCH, 1)),)

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        return binary_cross_entropy_with_logits(outputs["logits"].float()[:, 0], batch["labels"].float())

    def read(self, outputs: Outputs, batch: Batch, split: str, indices: Sequence[int]) -> list[float]:
        return list(finite(outputs)[:, 0])

    def score(self, split: str, found: list[float]) -> list[Score]:
        return _scores(np.array(found, dtype=np.float64), self._clicks[split])

    def distillation(
        self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor], temperature: float
    ) -> Tensor:
        """Of the probability of a click."""
        return bernoulli(student["logits"], teacher["logits"], temperature)

    def floor(self, seed: int) -> Score | None:
        columns: dict[str, tuple[Sequence[str], Any]] = {}
        for split, (texts, clicks) in self.texts.items():
            columns[split] = texts, np.asarray(clicks)[:, None]
        found = tfidf_labels(columns, seed)
        return None if found is None else _scores(found[:, 0], self._clicks["test"])[0]


def _scores(logits: np.ndarray, clicks: np.ndarray) -> list[Score]:
    loss = np.logaddexp(0.0, logits) - clicks * logits
    return [
        Score("log_loss", loss[:, None], MEAN, "number", higher_is_better=False),
        Score("auc", np.stack([logits, clicks], axis=1), AUC, "coefficient"),
    ]


def _check_whole(table: Table, field: str) -> None:
    """Raises DataError naming the first row without a text: no history, nothing offered."""
    for row, cell in enumerate(table[field]):
        if isinstance(cell, str) and not cell.strip():
            raise DataError(
                f"{table.place(field, row)} holds {shown(cell)}: a click cannot be told from nothing. Drop the row, or"
                " write there what stands for nothing, a word that the tokenizer knows."
            )


def _click(cell: object, table: Table, row: int) -> float:
    """0 or 1. Raises DataError naming the row."""
    found = _BITS.get(str(cell).strip().lower())
    if found is None:
        raise DataError(
            f"{table.place('label', row)} holds {shown(cell)} where a click is needed: 1, or 0 for none. Correct or"
            " drop the row, or set data.label to the column with the clicks."
        )
    return found
