"""One label per example: class names, the target column, accuracy and loss. For text, images and sound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from mptrain.data.sources.tables import Table
from mptrain.data.tasks.base import Batch, Outputs, TaskData, finite
from mptrain.data.tasks.labels import label_indices, label_names
from mptrain.data.tasks.metrics import Score


class ClassificationData(TaskData):
    """Any number of classes; scores are accuracy, then loss (mean cross-entropy in nats)."""

    labels: list[str]

    def index_labels(self, tables: Mapping[str, Table]) -> list[str]:
        train = tables["train"]
        names = label_names(train["label"], train.rows, train.classes.get("label"), f"data.label ({train.where})")
        counts = {}
        for split, table in tables.items():
            where = f"data.label ({table.where})"
            indices = label_indices(table["label"], table.rows, names, table.classes.get("label"), where)
            table.columns["label"] = indices
            counts[split] = {names[i]: n for i, n in sorted(Counter(indices).items())}
        self.facts["labels"] = counts
        self._targets: dict[str, np.ndarray] = {}
        return names

    def targets(self, split: str, table: Table) -> list[int]:
        """The class indices of a split, remembered for `score`."""
        self._targets[split] = np.asarray(table["label"], dtype=np.int64)
        return table["label"]

    def read(self, outputs: Outputs, batch: Batch, split: str, indices: Sequence[int]) -> list[np.ndarray]:
        return list(finite(outputs))

    def score(self, split: str, found: list[np.ndarray]) -> list[Score]:
        logits, targets = np.stack(found).astype(np.float64), self._targets[split]
        right = logits.argmax(axis=1) == targets
        shifted = logits - logits.max(axis=1, keepdims=True)
        loss = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(targets)), targets]
        return [
            Score("accuracy", right[:, None].astype(np.float64), "mean"),
            Score("loss", loss[:, None], "mean", higher_is_better=False),
        ]
