"""What all tasks share: encoded examples, calibration batches, evaluation and the content hash.

A task is a subclass of TaskData that says how rows become examples (`encode`), how examples become a
batch (`collate`), what to keep of a model's output per example (`read`) and what that is worth (`score`).
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from mptrain.core.errors import MptrainError
from mptrain.data.sources.splits import SPLITS, sample
from mptrain.data.sources.tables import Table
from mptrain.data.tasks.metrics import Score
from mptrain.recipe import Calibration, Data

TARGETS = ("labels", "start_positions", "end_positions")
IGNORED = -100
"""target of positions that count neither in the loss nor in a score"""

GROUP, IDENTITY = "split.group", "identity"
"""columns beside the fields of a task: the value that may not cross splits, and what makes inputs the same"""

Example = dict[str, Any]
Batch = dict[str, Tensor]
Outputs = Mapping[str, Any]


class Examples(Dataset):
    """Model inputs and targets by index, in data-set order. `lengths`: tokens or samples (images: 1)."""

    def __init__(self, get: Callable[[int], Example], lengths: Sequence[int]) -> None:
        self._get = get
        self.lengths = list(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        return self._get(index)


class TaskData(ABC):
    """The three splits of one task, ready for a model.

    Attributes:
        train, validation, test: Examples.
        labels: class names by index; None for tasks without classes.
        unseen: names of classes that only validation or test has, whose indices follow.
        hash: sha256 of what is used: inputs, targets and which split each row is in; not of paths.
        facts: JSON facts for the report, see `load_data`.
        texts: {split: (texts, class indices)} for text classification, else None.
    """

    task: ClassVar[str]
    columns: ClassVar[dict[str, str | None]]
    """fields of `data:` that mean something here, with their default column (None: only if given)"""
    inputs: ClassVar[tuple[str, ...]]
    """the fields a model sees; the others are targets"""
    in_order: ClassVar[bool] = False
    """rows are running text, so missing splits are cut off its end instead of drawn from all over"""

    texts: dict[str, tuple[list[str], list[int]]] | None = None
    unseen: list[str] = []
    min_length = 1
    """of `example`"""

    def __init__(self, tables: Mapping[str, Table], spec: Data, processor: Any, seed: int, facts: dict) -> None:
        self.spec = spec
        self.processor = processor
        self.seed = seed
        self.facts = facts
        self.labels = self.index_labels(tables)
        if not self.in_order:
            tables = {name: t.take(sample(len(t), spec.max_samples)) for name, t in tables.items()}
        self.hash = self._content_hash(tables)
        self._splits = {name: self.encode(name, tables[name]) for name in SPLITS}
        self.facts["examples"] = {name: len(examples) for name, examples in self._splits.items()}

    @property
    def train(self) -> Examples:
        return self._splits["train"]

    @property
    def validation(self) -> Examples:
        return self._splits["validation"]

    @property
    def test(self) -> Examples:
        return self._splits["test"]

    # -- what a task defines

    def index_labels(self, tables: Mapping[str, Table]) -> list[str] | None:
        """Replace labels by class indices in all tables and return the class names, if the task has classes."""
        return None

    @abstractmethod
    def encode(self, split: str, table: Table) -> Examples: ...

    @abstractmethod
    def collate(self, examples: list[Example]) -> Batch:
        """One padded batch: token ids int64 [b, s], float inputs float32, targets int64."""

    @abstractmethod
    def read(self, outputs: Outputs, batch: Batch, split: str, indices: Sequence[int]) -> list[Any]:
        """What `score` needs of each example in the batch, in the order of the batch."""

    @abstractmethod
    def score(self, split: str, found: list[Any]) -> list[Score]:
        """Scores from what `read` returned, given in data-set order."""

    @abstractmethod
    def example(self, batch: int, length: int) -> Batch:
        """`batch` real examples at exactly `length` tokens or samples, without targets.

        For tracing and latency. The longest training examples, cut or padded; images have one size.
        """

    @classmethod
    def identity(cls, table: Table) -> list[str]:
        """What makes two inputs the same, one string per row."""
        fields = [table[name] for name in cls.inputs if name in table.columns]
        return [json.dumps(row, ensure_ascii=False, default=str) for row in zip(*fields)]

    # -- what all tasks have

    def evaluate(
        self,
        forward: Callable[[Batch], Outputs],
        split: str,
        batch_size: int = 64,
        progress: str | None = None,
    ) -> list[Score]:
        """Score `forward`, a function from model inputs to named outputs (tensors or arrays), on a split.

        Batches are of similar length, longest first; statistics come back in data-set order. The first
        score is the main one. `progress` labels a bar, shown when stderr is a terminal. Raises MptrainError
        when an output is not finite.
        """
        examples = self._splits[split]
        order = sorted(range(len(examples)), key=lambda i: -examples.lengths[i])
        found: list[Any] = [None] * len(examples)
        hidden = progress is None or not sys.stderr.isatty()
        with torch.no_grad(), tqdm(total=len(order), desc=progress, disable=hidden, leave=False) as bar:
            for start in range(0, len(order), batch_size):
                indices = order[start : start + batch_size]
                batch = self.collate([examples[i] for i in indices])
                outputs = forward(without_targets(batch))
                for index, value in zip(indices, self.read(outputs, batch, split, indices), strict=True):
                    found[index] = value
                bar.update(len(indices))
        return self.score(split, found)

    def calibration(self, samples: int, batch_size: int) -> list[Batch]:
        """Model inputs of `samples` training examples drawn by the seed, batched by length."""
        return [without_targets(batch) for batch in self._drawn(samples, batch_size)]

    def labelled(self, calibration: Calibration) -> list[Batch]:
        """The same batches with their targets, for gradients."""
        return self._drawn(calibration.samples, calibration.batch_size)

    def _drawn(self, samples: int, batch_size: int) -> list[Batch]:
        rows = random.Random(self.seed).sample(range(len(self.train)), min(samples, len(self.train)))
        # Little padding: what pads say about ranges is not what text says.
        rows.sort(key=lambda i: (self.train.lengths[i], i))
        return [
            self.collate([self.train[i] for i in rows[start : start + batch_size]])
            for start in range(0, len(rows), batch_size)
        ]

    def _longest(self, count: int) -> list[Example]:
        """The longest training examples, repeated when there are fewer than `count`."""
        order = sorted(range(len(self.train)), key=lambda i: (-self.train.lengths[i], i))
        return [self.train[order[i % len(order)]] for i in range(count)]

    def _content_hash(self, tables: Mapping[str, Table]) -> str:
        classes = [self.labels, self.unseen] if self.unseen else self.labels
        digest = hashlib.sha256(json.dumps(classes).encode())
        for name in SPLITS:
            table = tables[name]
            targets = [table[column] for column in table.columns if column not in (*self.inputs, GROUP, IDENTITY)]
            for row in zip(table[IDENTITY], *targets):
                line = json.dumps([name, *row], ensure_ascii=False, sort_keys=True, default=str)
                digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
        return digest.hexdigest()


def without_targets(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name not in TARGETS}


def finite(outputs: Outputs, name: str = "logits") -> np.ndarray:
    """One output as a float32 array. Raises MptrainError when it is missing or not finite."""
    if name not in outputs:
        raise MptrainError(f"The model has no output {name!r}, which its task needs; it has {', '.join(outputs)}.")
    value = outputs[name]
    array = value.detach().float().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value, np.float32)
    if not np.isfinite(array).all():
        raise MptrainError(
            f"The model's {name} hold {(~np.isfinite(array)).sum()} values of {array.size} that are not finite in one"
            " batch, so it cannot be scored. Weights that diverged in training (lower the lr) or a precision that"
            " overflows are the usual causes."
        )
    return array


def stack(arrays: Iterable[Any], fill: float, length: int | None = None) -> Tensor:
    """Arrays [s_i, ...] as one tensor [b, s, ...], padded with `fill` (or cut) to `length` or to the longest."""
    arrays = [np.asarray(a) for a in arrays]
    size = max(len(a) for a in arrays) if length is None else length
    whole = np.full((len(arrays), size, *arrays[0].shape[1:]), fill, dtype=arrays[0].dtype)
    for row, array in zip(whole, arrays):
        row[: len(array)] = array[:size]
    return torch.from_numpy(whole)
