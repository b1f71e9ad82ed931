"""One label per example: class names, the target column, accuracy and loss. For text, images and sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mptrain.core.signature import BATCH, Port
from mptrain.data.sources.tables import Table
from mptrain.data.tasks.arrays import finite
from mptrain.data.tasks.base import Batch, Outputs, Task
from mptrain.data.tasks.divergence import IGNORED
from mptrain.data.tasks.labels import Column, classes_of
from mptrain.data.tasks.metrics import MEAN, RATIO, Score


class Classification(Task):
    """Any number of classes; scores are accuracy, then loss (mean cross-entropy in nats)."""

    labels: list[str]
    without_label = IGNORED

    def index_labels(self, tables: Mapping[str, Table]) -> list[str]:
        columns = {
            split: Column(table["label"], table.rows, table.classes.get("label"), f"data.label ({table.where})")
            for split, table in tables.items()
        }
        found = classes_of(columns, self.spec.labels, "data.label")
        for split, table in tables.items():
            table.columns["label"] = found.indices[split]
        self.facts["labels"] = found.counts
        self.unseen = found.unseen
        self._targets: dict[str, np.ndarray] = {}
        return found.names

    def targets(self, split: str, table: Table) -> list[int]:
        """The class indices of a split, remembered for `score`."""
        self._targets[split] = np.asarray(table["label"], dtype=np.int64)
        return table["label"]

    def labelled_share(self, batch: Batch) -> float:
        return float((batch["labels"] != IGNORED).float().mean())

    def outputs(self) -> tuple[Port, ...]:
        return (Port("logits", (BATCH, len(self.labels))),)

    def read(self, outputs: Outputs, batch: Batch, split: str, indices: Sequence[int]) -> list[np.ndarray]:
        return list(finite(outputs))

    def score(self, split: str, found: list[np.ndarray]) -> list[Score]:
        logits, targets = np.stack(found).astype(np.float64), self._targets[split]
        right = logits.argmax(axis=1) == targets
        shifted = logits - logits.max(axis=1, keepdims=True)
        known = targets < logits.shape[1]  # a class without an output has no loss, it is only wrong
        chosen = shifted[np.arange(len(targets)), np.where(known, targets, 0)]
        loss = np.where(known, np.log(np.exp(shifted).sum(axis=1)) - chosen, 0.0)
        counted = np.stack([loss, known], axis=1).astype(np.float64)
        return [
            Score("accuracy", right[:, None].astype(np.float64), MEAN),
            Score("loss", loss[:, None], MEAN, "number", higher_is_better=False)
            if known.all()
            else Score("loss", counted, RATIO, "number", higher_is_better=False),
        ]
