"""What all tasks share: encoded examples, calibration batches, evaluation and the content hash.

A task is a row of TASKS and a subclass of Task, which says how rows become examples (`encode`), how examples become
a batch (`collate`), what to keep of a model's output per example (`read`) and what that is worth (`score`). Where
the answer of all others does not fit it, it also says what its loss is (`loss`), when two models agree
(`agreement`) and what a student learns of a teacher (`distillation`).
"""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mptrain.core.errors import DataError
from mptrain.core.progress import progress as said
from mptrain.core.signature import BATCH, Batch, Outputs, Port, Signature, by_name, without_cache
from mptrain.data.sources.splits import SPLITS, sample
from mptrain.data.sources.tables import Table
from mptrain.data.tasks import agreement, divergence
from mptrain.data.tasks.arrays import finite, stack
from mptrain.data.tasks.content import GROUP, IDENTITY, Content
from mptrain.data.tasks.divergence import IGNORED
from mptrain.data.tasks.metrics import Measure, Score
from mptrain.recipe import Calibration, Data, Stage, TaskSpec

__all__ = ["GROUP", "IDENTITY", "IGNORED", "Batch", "Example", "Examples", "Outputs", "Task", "finite", "stack"]

BATCH_BYTES = 64 * 2**20
"""the most that the outputs of a batch may take where the recipe says no batch size; a runtime holds them twice"""
BATCH_SIZE = 64

Example = dict[str, Any]


class Examples(Dataset):
    """Model inputs and targets by index, in data-set order. `lengths`: tokens or samples (images: 1)."""

    def __init__(self, get: Callable[[int], Example], lengths: Sequence[int]) -> None:
        self._get = get
        self.lengths = list(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        return self._get(index)


class Task(ABC):
    """One task with its three splits, ready for a model.

    Attributes:
        train, validation, test: Examples.
        labels: class names by index; None for tasks without classes.
        unseen: names of classes that only validation or test has, whose indices follow.
        hash: sha256 of what is used: inputs, targets and which split each row is in; not of paths. Of encrypted data
            it is keyed, so that it does not tell who has the data from who guesses it.
        secret: of encrypted data; keys what is kept of it.
        facts: JSON facts for the report, see `load_data`.
    """

    kind: ClassVar[TaskSpec]
    """its row of TASKS"""
    in_order: ClassVar[bool] = False
    """rows are running text, so missing splits are cut off its end instead of drawn from all over"""
    measures: ClassVar[Mapping[str, Measure]] = {}
    """what its scores are functions of, beside `metrics.MEASURES`: a run folder keeps their names"""

    without_label: ClassVar[Any] = None
    """cell of a label column that the loss passes over, of tasks with the option `unlabelled`"""

    unseen: list[str] = []
    unlabelled: Examples | None = None
    """inputs without targets, see `add_unlabelled`"""
    min_length = 1
    """of `example`"""

    def __init__(self, tables: Mapping[str, Table], spec: Data, processor: Any, seed: int, facts: dict) -> None:
        self.spec = spec
        self.processor = processor
        self.seed = seed
        self.facts = facts
        self.secret = tables["train"].secret
        self._content = Content(self.secret, self.inputs())
        self.labels = self.index_labels(tables)
        if not self.in_order:
            tables = {name: t.take(sample(len(t), spec.max_samples)) for name, t in tables.items()}
        self.hash = self._content.of_splits([self.labels, self.unseen] if self.unseen else self.labels, tables)
        self._known = {key for table in tables.values() for key in table[IDENTITY]} if spec.unlabelled else set[str]()
        self._splits = {name: self.encode(name, tables[name]) for name in SPLITS}
        self.facts["examples"] = {name: len(examples) for name, examples in self._splits.items()}
        # scores of runs that have it alike are of the same examples in the same order: inputs and targets of test
        self.facts["test_hash"] = (
            self._content.of_examples(self.test[i] for i in range(len(self.test)))
            if self.in_order
            else self._content.of_rows("test", tables["test"])
        )

    @property
    def train(self) -> Examples:
        return self._splits["train"]

    @property
    def validation(self) -> Examples:
        return self._splits["validation"]

    @property
    def test(self) -> Examples:
        return self._splits["test"]

    def add_unlabelled(self, table: Table) -> None:
        """Inputs for distillation alone; table: the fields of inputs and IDENTITY. Those in a split are left out: the
        training split has them with their targets, and what scores a model does not teach it."""
        known = self._known
        new = [row for row, key in enumerate(table[IDENTITY]) if key not in known]
        left_out = len(table) - len(new)
        new = [new[i] for i in sample(len(new), self.spec.max_samples)]
        if not new:
            raise DataError(f"data.unlabelled: all {len(table)} inputs of {table.where} are in a split; give others.")
        table = table.take(new)
        table.columns |= {name: [self.without_label] * len(new) for name, c in self.kind.columns.items() if c.target}
        self.hash = self._content.with_more(self.hash, "unlabelled", table)
        self.unlabelled = self.encode("unlabelled", table)
        self.facts["unlabelled"] = {"examples": len(new), "in_a_split": left_out}

    def taught(self, *, distilled: bool) -> Examples:
        """What a stage trains on: with a teacher also the inputs without targets, behind the training split."""
        if not distilled or self.unlabelled is None:
            return self.train
        own, more, count = self.train, self.unlabelled, len(self.train)
        return Examples(lambda i: own[i] if i < count else more[i - count], [*own.lengths, *more.lengths])

    def rows(self, stage: Stage) -> int:
        """Examples that a stage trains on."""
        return len(self.taught(distilled=stage.distill is not None))

    # -- what a task defines

    def index_labels(self, tables: Mapping[str, Table]) -> list[str] | None:
        """Replace labels by class indices in all tables and return the names of the model's outputs, if it has such."""
        return None

    @abstractmethod
    def encode(self, split: str, table: Table) -> Examples: ...

    def row_of(self, split: str, index: int) -> int:
        """The row of a split that an example is of: it may be one of several."""
        return index

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
    def outputs(self) -> tuple[Port, ...]:
        """What its models give, of which `read` needs all."""

    @abstractmethod
    def example(self, batch: int, length: int) -> Batch:
        """`batch` real examples at exactly `length` tokens or samples, without targets.

        For tracing and latency. The longest training examples, cut or padded; images have one size.
        """

    @classmethod
    def fields(cls, chosen: dict[str, str], spec: Data, columns: Sequence[str]) -> dict[str, str]:
        """The columns to read, by field. chosen: those that the recipe names, or by default; columns: of the data."""
        return chosen

    @classmethod
    def group(cls, table: Table) -> str | None:
        """The field whose values never cross splits, where neither recipe nor data say one. table: fields, of train."""
        return None

    @classmethod
    def identity(cls, table: Table) -> list[str]:
        """What makes two inputs the same, one string per row."""
        fields = [table[name] for name in cls.inputs() if name in table.columns]
        return [json.dumps(row, ensure_ascii=False, default=str) for row in zip(*fields)]

    # -- what a task may define

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor | None:
        """The loss of a batch with targets, a scalar; None where models compute it, from the targets, themselves.

        A model is given no targets by a task that computes its loss.
        """
        return None

    def labelled_share(self, batch: Batch) -> float:
        """Of the examples of a batch, those that have targets."""
        return 1.0

    def answers(self, forward: Callable[[Batch], Outputs], batch: Batch) -> Outputs:
        """What `read` gets for a batch of inputs: what the model gives; a task whose models write calls it again."""
        return forward(batch)

    @classmethod
    def agreement(cls, expected: Outputs, got: Outputs, batch: Batch) -> np.ndarray:
        """How far two models decide alike on a batch of inputs: a number in 0..1 to each decision.

        Here: whether they choose the same class (of each token, in a task per token), or, of models with one
        output, how far they put the examples in the same order.
        """
        return agreement.decisions(expected, got, batch if cls.kind.per_token else None)

    def distillation(
        self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor], temperature: float
    ) -> Tensor:
        """What a student is taught beside the task's loss, a scalar. batch: with targets. Here: of the logits."""
        names = [port.name for port in self.outputs()]
        return divergence.of_logits(student, teacher, batch, temperature, names=names, causal=self.kind.causal)

    def floor(self, seed: int) -> Score | None:
        """The main score, on test, of the model without a network that `kind.floor` names; None without one."""
        return None

    def example_bytes(self, length: int) -> int:
        """Of the outputs of an example, as far as the task knows their sizes."""
        sizes = {BATCH: 1, str(self.kind.unit): length}
        known = [[axis if isinstance(axis, int) else sizes.get(axis, 1) for axis in p.axes] for p in self.outputs()]
        return sum(4 * int(np.prod(axes)) for axes in known)

    # -- what all tasks have

    @classmethod
    def inputs(cls) -> list[str]:
        """The fields of `data:` that a model sees; the others are targets."""
        return [name for name, column in cls.kind.columns.items() if not column.target]

    @classmethod
    def without_targets(cls, batch: Batch) -> Batch:
        return {name: value for name, value in batch.items() if name not in cls.kind.targets}

    @classmethod
    def computes_loss(cls) -> bool:
        """Whether `loss` does it, and not the models."""
        return cls.loss is not Task.loss

    def model_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a model on a batch with targets, a scalar with its graph."""
        if not self.computes_loss():
            return model(**batch).loss
        loss = self.loss(model(**self.without_targets(batch)), batch)
        assert loss is not None
        return loss

    def signature(self, accepted: Collection[str] | None = None) -> Signature:
        """What its models take and give. accepted: the inputs of a model that does not take all of them."""
        small, large = (self.example(n, n * self.min_length) for n in (1, 2))
        inputs = []
        for name, value in small.items():
            grows = [a != b for a, b in zip(value.shape[1:], large[name].shape[1:])]
            axes = [str(self.kind.unit) if free else size for free, size in zip(grows, value.shape[1:])]
            if accepted is None or name in accepted:
                inputs.append(Port(name, (BATCH, *axes), str(value.dtype).removeprefix("torch.")))
        return Signature(tuple(inputs), self.outputs())

    def batch_size(self, split: str, most: int = BATCH_SIZE) -> int:
        """Examples to score at a time so that their outputs stay below BATCH_BYTES, `most` at most."""
        longest = max(self._splits[split].lengths, default=1)
        return max(1, min(most, BATCH_BYTES // max(1, self.example_bytes(longest))))

    def evaluate(
        self,
        forward: Callable[[Batch], Outputs],
        split: str,
        batch_size: int | None = None,
        progress: str | None = None,
    ) -> list[Score]:
        """Score `forward`, a function from model inputs to named outputs (tensors or arrays), on a split.

        Batches are of similar length, longest first; statistics come back in data-set order. The first
        score is the main one. batch_size: default what the method of that name finds. `progress` labels what is
        said of how far it is (core/progress). Raises MptrainError when an output is not finite.
        """
        examples = self._splits[split]
        batch_size = batch_size or self.batch_size(split)
        order = sorted(range(len(examples)), key=lambda i: -examples.lengths[i])
        found: list[Any] = [None] * len(examples)
        with torch.no_grad(), said(progress or "", len(order), shown=progress is not None) as bar:
            for start in range(0, len(order), batch_size):
                indices = order[start : start + batch_size]
                batch = self.collate([examples[i] for i in indices])
                outputs = self.answers(forward, self.without_targets(batch))
                for index, value in zip(indices, self.read(outputs, batch, split, indices), strict=True):
                    found[index] = value
                bar.update(len(indices))
        return self.score(split, found)

    def validated(self, model: nn.Module) -> Score:
        """The main score of a torch model on the validation split, in eval mode and on its device."""
        device, training = next((p.device for p in model.parameters()), torch.device("cpu")), model.training
        model.eval()
        try:
            with without_cache(model):
                return self.evaluate(lambda b: by_name(model(**{n: v.to(device) for n, v in b.items()})), "validation")[
                    0
                ]
        finally:
            model.train(training)

    def calibration(self, samples: int, batch_size: int) -> list[Batch]:
        """Model inputs of `samples` training examples drawn by the seed, batched by length."""
        return [self.without_targets(batch) for batch in self._drawn(samples, batch_size)]

    def labelled(self, calibration: Calibration) -> list[Batch]:
        """The same batches with their targets, for gradients."""
        return self._drawn(calibration.samples, calibration.batch_size)

    def _drawn(self, samples: int, batch_size: int) -> list[Batch]:
        # Little padding: what pads say about ranges is not what text says.
        return self._batches("train", samples, batch_size, key=self.train.lengths.__getitem__)

    def held_out(self, samples: int, batch_size: int) -> list[Batch]:
        """Model inputs of `samples` validation examples drawn by the seed: no weight, range or set of operations was
        chosen by them. Batches mix lengths, so that padding is tried too."""
        return [self.without_targets(batch) for batch in self._batches("validation", samples, batch_size)]

    def _batches(
        self, split: str, samples: int, batch_size: int, key: Callable[[int], int] = lambda i: 0
    ) -> list[Batch]:
        examples = self._splits[split]
        rows = random.Random(self.seed).sample(range(len(examples)), min(samples, len(examples)))
        rows.sort(key=lambda i: (key(i), i))
        return [
            self.collate([examples[i] for i in rows[start : start + batch_size]])
            for start in range(0, len(rows), batch_size)
        ]

    def _longest(self, count: int) -> list[Example]:
        """The longest training examples, repeated when there are fewer than `count`."""
        order = sorted(range(len(self.train)), key=lambda i: (-self.train.lengths[i], i))
        return [self.train[order[i % len(order)]] for i in range(count)]
