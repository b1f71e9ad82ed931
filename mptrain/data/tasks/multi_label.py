"""Any number of labels for a text, or for a pair of texts.

The model has an output to each label and is trained by binary cross-entropy; a label is predicted where its logit is
above 0 (probability 1/2). Of n rows and C labels, with true and false positives and false negatives counted per label:

    micro_f1   2 Σtp / (2 Σtp + Σfp + Σfn)         macro_f1   mean over labels of 2tp / (2tp + fp + fn)
    map        mean over labels of the average precision Σ_k (R_k − R_{k−1}) P_k, of rows ordered by their logit
    loss       mean binary cross-entropy, nats per label

A label that is neither there nor predicted has no F1, and one that is never there no average precision: it is left out
of the mean. (scikit-learn's f1_score with zero_division=nan, and average_precision_score.)

Columns hold labels as people write them: lists, `a|b|c` (or with ; or ,), JSON lists, or one column of 0 and 1 to each
label, which `data.labels` then names.
"""

from __future__ import annotations

import ast
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mptrain.core.errors import DataError
from mptrain.core.signature import BATCH, Batch, Outputs, Port
from mptrain.data.sources.quoting import listed, shown
from mptrain.data.sources.tables import Table, check_unicode
from mptrain.data.tasks.agreement import array
from mptrain.data.tasks.arrays import finite
from mptrain.data.tasks.base import Example
from mptrain.data.tasks.divergence import bernoulli
from mptrain.data.tasks.floor import tfidf_labels
from mptrain.data.tasks.metrics import F1, MEAN, Measure, Score
from mptrain.data.tasks.text import pad
from mptrain.data.tasks.text_task import TextTask
from mptrain.recipe import TASKS, Data

log = logging.getLogger(__name__)

SEPARATORS = ("|", ";", ",")
"""of labels in one text cell: the first of them that occurs in the training split"""
_ONE = "label."
"""before the name of a label that has a column of its own"""
_NEVER = -1e4  # logit of a label without an output
_BITS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


def _macro_f1(mean: np.ndarray) -> float:
    """Of the means of tp, fp, fn [3, labels], one after the other."""
    right, spurious, missed = mean.reshape(3, -1)
    whole = 2 * right + spurious + missed
    return float((2 * right[whole > 0] / whole[whole > 0]).mean()) if (whole > 0).any() else float("nan")


def _mean_average_precision(rows: np.ndarray) -> float:
    logits, targets = np.split(rows, 2, axis=1)
    order = np.argsort(-logits, axis=0, kind="stable")
    logits, targets = np.take_along_axis(logits, order, 0), np.take_along_axis(targets, order, 0)
    found = np.cumsum(targets, axis=0)
    precision = found / np.arange(1, len(rows) + 1)[:, None]
    last = np.append(logits[1:] != logits[:-1], np.ones((1, logits.shape[1]), bool), axis=0)
    # rows of one logit are one step: its precision is that at the last of them
    step = np.where(last, np.arange(len(rows))[:, None], len(rows))
    step = np.minimum.accumulate(step[::-1], axis=0)[::-1]
    hits = found[-1]
    gained = (targets * np.take_along_axis(precision, step, 0)).sum(axis=0)
    return float((gained[hits > 0] / hits[hits > 0]).mean()) if (hits > 0).any() else float("nan")


MACRO_F1 = Measure("macro_f1", _macro_f1)
MAP = Measure("map", _mean_average_precision, whole=True)


class MultiLabel(TextTask):
    """Scores are micro F1, macro F1, mean average precision and loss."""

    kind = TASKS["multi-label-classification"]
    measures = {m.name: m for m in (MACRO_F1, MAP)}
    labels: list[str]

    @classmethod
    def fields(cls, chosen: dict[str, str], spec: Data, columns: Sequence[str]) -> dict[str, str]:
        """A column to each of `data.labels`, where these are what the table has."""
        names = [str(label) for label in spec.labels or []]
        if not names or chosen["label"] in columns or not set(names) & set(columns):
            return chosen
        rest = {field: column for field, column in chosen.items() if field != "label"}
        return rest | {f"{_ONE}{name}": name for name in names}

    def index_labels(self, tables: Mapping[str, Table]) -> list[str]:
        given = None if self.spec.labels is None else [str(label) for label in self.spec.labels]
        if given is not None and len(set(given)) < len(given):
            raise DataError(f"data.labels: names differ, got {given}; drop what is there twice.")
        if given is not None and f"{_ONE}{given[0]}" in tables["train"].columns:
            sets = {split: _from_columns(table, given) for split, table in tables.items()}
        else:
            separator = _separator(tables["train"]["label"])
            self.facts["separator"] = separator
            sets = {s: [_labels(t, row, separator, given) for row in range(len(t))] for s, t in tables.items()}
        names = given if given is not None else sorted({name for row in sets["train"] for name in row})
        if len(names) < 2:
            raise DataError(
                f"data.label ({tables['train'].where}): there is one label, {listed(names)}; labels are lists, or"
                f" joined by one of {' '.join(SEPARATORS)}. For one label to each row the task is text-classification."
            )
        for split, table in tables.items():
            for row, found in enumerate(sets[split]):
                unknown = sorted(set(found) - set(names))
                if unknown and given is not None:
                    raise DataError(
                        f"{table.place('label', row)} has the label {shown(unknown[0])}, which data.labels does not"
                        f" name; it has {', '.join(names[:12])}. Correct the row or data.labels."
                    )
        self.unseen = sorted({name for found in sets.values() for row in found for name in row} - set(names))
        if self.unseen:
            log.warning(
                "data.label: the training split lacks %d of the labels of the others (first: %s); no output stands for"
                " them, so where a row has one it counts as missed",
                len(self.unseen),
                shown(self.unseen[0]),
            )
        self._targets: dict[str, np.ndarray] = {}
        index = {name: i for i, name in enumerate([*names, *self.unseen])}
        for split, table in tables.items():
            table.columns["label"] = [sorted(index[name] for name in set(found)) for found in sets[split]]
        self.facts["labels"] = {
            split: {name: n for name in index if (n := Counter(x for row in found for x in set(row))[name])}
            for split, found in sets.items()
        }
        if never := [name for name in names if name not in self.facts["labels"]["train"]]:
            raise DataError(
                f"data.labels: no row of {tables['train'].where} has the label {never[0]!r}"
                f"{f' (nor {len(never) - 1} others)' if len(never) > 1 else ''}, so it cannot be learned; drop it."
            )
        return names

    def targets(self, split: str, table: Table) -> list[np.ndarray]:
        found = np.zeros((len(table), len(self.labels) + len(self.unseen)), dtype=np.float32)
        for row, chosen in zip(found, table["label"]):
            row[chosen] = 1.0
        self._targets[split] = found
        return list(found[:, : len(self.labels)])

    def collate(self, examples: list[Example]) -> Batch:
        inputs = [{name: value for name, value in e.items() if name != "labels"} for e in examples]
        return pad(inputs, self.processor) | {"labels": torch.tensor(np.stack([e["labels"] for e in examples]))}

    def example(self, batch: int, length: int) -> Batch:
        inputs = [{name: value for name, value in e.items() if name != "labels"} for e in self._longest(batch)]
        return pad(inputs, self.processor, length)

    def outputs(self) -> tuple[Port, ...]:
        return (Port("logits", (BATCH, len(self.labels))),)

    def read(self, outputs: Outputs, batch: Batch, split: str, indices: Sequence[int]) -> list[np.ndarray]:
        return list(finite(outputs))

    def score(self, split: str, found: list[np.ndarray]) -> list[Score]:
        return _scores(np.stack(found).astype(np.float64), self._targets[split].astype(np.float64))

    @classmethod
    def agreement(cls, expected: Outputs, got: Outputs, batch: Batch) -> np.ndarray:
        """Of each row the labels that both predict over those that one does; 1 where neither predicts any."""
        ours, theirs = (array(outputs["logits"]) > 0 for outputs in (expected, got))
        either = (ours | theirs).sum(1)
        return np.where(either > 0, (ours & theirs).sum(1) / np.maximum(either, 1), 1.0)

    def distillation(
        self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor], temperature: float
    ) -> Tensor:
        """T² · mean over labels of KL(Bernoulli(teacher / T) || Bernoulli(student / T))."""
        return bernoulli(student["logits"], teacher["logits"], temperature)

    def floor(self, seed: int) -> Score | None:
        found = tfidf_labels(self.texts, seed)
        return None if found is None else _scores(found, self._targets["test"].astype(np.float64))[0]


def _scores(logits: np.ndarray, targets: np.ndarray) -> list[Score]:
    """logits [n, labels], targets [n, labels and those that no output stands for]."""
    loss = np.logaddexp(0.0, logits) - targets[:, : logits.shape[1]] * logits
    never = np.full((len(logits), targets.shape[1] - logits.shape[1]), _NEVER)
    logits = np.concatenate([logits, never], axis=1)
    chosen = (logits > 0).astype(np.float64)
    counts = np.stack([chosen * targets, chosen * (1 - targets), (1 - chosen) * targets], axis=1)
    return [
        Score("micro_f1", counts.sum(axis=2), F1),
        Score("macro_f1", counts.reshape(len(counts), -1), MACRO_F1),
        Score("map", np.concatenate([logits, targets], axis=1), MAP),
        Score("loss", loss.mean(axis=1)[:, None], MEAN, "number", higher_is_better=False),
    ]


def _separator(cells: Sequence[Any]) -> str | None:
    """What joins labels in the text cells of a column; None where nothing does."""
    texts = [cell for cell in cells if isinstance(cell, str) and not cell.lstrip().startswith("[")]
    return next((mark for mark in SEPARATORS if any(mark in text for text in texts)), None)


def _labels(table: Table, row: int, separator: str | None, given: Sequence[str] | None) -> list[str]:
    """The names in one cell. None is an error but where `data.labels` says what the labels are."""
    cell = table["label"][row]
    place = table.place("label", row)
    items = _parsed(cell) if isinstance(cell, str) and cell.lstrip().startswith("[") else cell
    if isinstance(items, str):
        items = [part.strip() for part in (items.split(separator) if separator else [items])]
        items = items if any(items) else []
    declared = table.classes.get("label")
    if declared is not None and isinstance(items, list):
        items = [declared[i] if isinstance(i, int) and 0 <= i < len(declared) else i for i in items]
    if not isinstance(items, list) or not all(isinstance(i, str | int) and not isinstance(i, bool) for i in items):
        raise DataError(
            f"{place} holds {shown(cell)} where labels are needed: a list of names, or names joined by one of"
            f" {' '.join(SEPARATORS)}. Correct the row, or set data.label to the column with the labels."
        )
    names = [str(item) for item in items]
    if not names and given is None:
        raise DataError(
            f"{place} has no label. Give it one or drop the row; where rows may have none, say so by naming the labels"
            " in data.labels."
        )
    if "" in names:
        raise DataError(f"{place} holds {shown(cell)}, in which a label is empty; correct the row.")
    for name in names:
        check_unicode(name, place)
    return names


def _parsed(cell: str) -> Any:
    """A list as JSON or Python writes it, else the text."""
    try:
        return ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return cell


def _from_columns(table: Table, names: Sequence[str]) -> list[list[str]]:
    """From a column of 0 and 1 to each label, which are replaced by the column `label`."""
    columns = [table.columns.pop(f"{_ONE}{name}") for name in names]
    found = []
    for row, cells in enumerate(zip(*columns)):
        bits = [_BITS.get(str(cell).strip().lower()) for cell in cells]
        if None in bits:
            column, cell = names[bits.index(None)], cells[bits.index(None)]
            raise DataError(
                f"data.labels: row {table.rows[row]} of {table.where} holds {shown(cell)} in the column {column!r},"
                " where 0 or 1 is needed. Correct the row, or drop the column from data.labels."
            )
        found.append([name for name, bit in zip(names, bits) if bit])
    return found
