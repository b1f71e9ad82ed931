"""What a caller hands over: a model in memory, batches, a data set. Everything after this knows `Loaded` and batches.

A batch is a mapping of names to tensors [batch, …], as the model's forward takes them, targets beside the inputs or
not. `data` is one batch, an iterable of batches (a list, a DataLoader), or a data set of examples, which a collator
makes batches of. Names that the forward does not take are an error, never dropped.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, default_data_collator

from mptrain.core.errors import DataError, ModelError, UserError
from mptrain.core.signature import Batch, rows_of
from mptrain.models.samples import BATCH, Loaded, Samples, guess_task, made_up, readable, tokens_read
from mptrain.recipe import TASKS, TaskSpec, tasks
from mptrain.recipe.task import NO_TASK

Collator = Callable[[list[Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Given:
    """`data` of a call. rows: examples, of a data set; None where batches were given. collate: makes batches of them.
    where: the argument, for errors."""

    batches: Iterable[Mapping[str, Any]]
    rows: Sequence[Any] | None
    collate: Collator
    where: str

    def labelled(self, count: int) -> list[Batch]:
        """Batches as they are, with at least `count` examples where there are so many. Raises DataError."""
        found: list[Batch] = []
        for batch in self._all():
            found.append(_checked(batch, self.where))
            if sum(map(rows_of, found)) >= count:
                break
        if not found:
            raise DataError(f"{self.where}: holds no batch; give batches of inputs, or a data set of examples")
        return found

    def _all(self) -> Iterator[Mapping[str, Any]]:
        if self.rows is None:
            yield from self.batches
            return
        for start in range(0, len(self.rows), BATCH):
            yield self.collate([self.rows[i] for i in range(start, min(start + BATCH, len(self.rows)))])

    def dataset(self) -> tuple[Sequence[Any], Collator]:
        """To train on: examples and their collator; of batches the rows of them."""
        if self.rows is not None:
            return self.rows, self.collate
        rows = [{name: value[i] for name, value in batch.items()} for batch in self.labelled(2**62)
                for i in range(rows_of(batch))]  # fmt: skip
        shapes = {tuple((name, tuple(value.shape)) for name, value in row.items()) for row in rows}
        if len(shapes) > 1:
            raise DataError(
                f"{self.where}: its batches have examples of {len(shapes)} sizes, which no training batch can mix; give"
                " a data set and data_collator, or a DataLoader of one"
            )
        return rows, default_data_collator


def given(data: Any, where: str = "data", collate: Collator | None = None) -> Given:
    """collate: of the examples of a data set; default transformers' `default_data_collator`. Raises DataError."""
    if isinstance(data, DataLoader):
        rows = data.dataset if hasattr(data.dataset, "__len__") else None
        return Given(data, cast(Any, rows), collate or cast(Any, data.collate_fn), where)
    collate = collate or default_data_collator
    if isinstance(data, Mapping):
        return Given([data], None, collate, where)
    if isinstance(data, Dataset) or hasattr(data, "column_names"):
        if not hasattr(data, "__len__"):
            raise DataError(f"{where}: a streamed data set has no length here; give a list of its batches")
        return Given((), cast(Any, data), collate, where)
    if not isinstance(data, Iterable):
        raise DataError(f"{where}: must be batches or a data set, got {type(data).__name__}")
    items = list(data)
    if items and not all(isinstance(item, Mapping) for item in items):
        raise DataError(
            f"{where}: its items must be mappings of names to tensors, got {type(items[0]).__name__}; name the inputs"
            " as the model's forward does, e.g. [{'x': x}]"
        )
    return Given(items, None, collate, where) if not items or _is_batch(items[0]) else Given((), items, collate, where)


def _is_batch(item: Mapping[str, Any]) -> bool:
    """Whether all values are tensors of one first size; an example has a number or a list among them."""
    sizes = {value.shape[:1] for value in item.values() if isinstance(value, Tensor)}
    return all(isinstance(value, Tensor) for value in item.values()) and len(sizes) == 1 and sizes != {torch.Size()}


def _checked(batch: Mapping[str, Any], where: str) -> Batch:
    wrong = [name for name, value in batch.items() if not isinstance(value, Tensor) or value.dim() < 1]
    if wrong or len({len(value) for value in batch.values()}) != 1:
        shapes = {name: list(getattr(value, "shape", ())) or type(value).__name__ for name, value in batch.items()}
        raise DataError(f"{where}: a batch must hold tensors [batch, …] of as many examples each, got {shapes}")
    return dict(batch)


def kind_of(model: nn.Module, task: str | None) -> TaskSpec:
    """The task of a model of transformers, from its class where none is named; of another module none."""
    if task is not None:
        tasks.check(task, "task")
        return TASKS[task]
    if not isinstance(model, PreTrainedModel):
        return NO_TASK
    config = copy.copy(model.config)
    config.architectures = [getattr(type(model), "mptrain_base", type(model)).__name__]
    try:
        return TASKS[guess_task(config)]
    except ModelError:
        return NO_TASK


def inputs_of(model: nn.Module, batches: Sequence[Batch], kind: TaskSpec, where: str) -> list[Batch]:
    """Without targets, on the CPU. Raises UserError for names that the model's forward does not take."""
    parameters = inspect.signature(model.forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and not isinstance(model, PreTrainedModel)
    found = []
    for batch in batches:
        kept = {name: value.detach().cpu() for name, value in batch.items() if name not in kind.targets}
        unknown = [name for name in kept if name not in parameters and not anything]
        if unknown:
            takes = [name for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
            raise UserError(
                f"{where}: {type(model).__name__} takes no {', '.join(map(repr, unknown))}; its forward takes"
                f" {', '.join(takes[:8])}. Take them out of the batches"
            )
        found.append(kept)
    return found


def loaded(
    model: nn.Module,
    data: Any,
    *,
    where: str,
    task: str | None = None,
    count: int = 32,
    length: int = 128,
    processor: Any = None,
) -> Loaded:
    """A model in memory as commands have it, in eval mode. data: None, inputs are made up where that is possible.

    count: of inputs. length: of texts that are made up. Raises UserError.
    """
    kind, task = (found := kind_of(model, task)), "" if found is NO_TASK else found.name
    if data is not None:
        batches = inputs_of(model, given(data, where).labelled(count), kind, where)
        samples = Samples(batches, where)
    elif kind is NO_TASK or not isinstance(model, PreTrainedModel):
        raise UserError(
            f"{where}: inputs cannot be made up for {type(model).__name__}; give a batch, a mapping of the names of its"
            f" forward ({', '.join(islice(inspect.signature(model.forward).parameters, 4))}) to tensors [batch, …]"
        )
    else:
        size = tokens_read(model, length) if kind.processor == "tokenizer" else None
        samples = readable(model, made_up(model, kind, count, size, processor))
    return Loaded(cast(PreTrainedModel, model), None, task, samples, processor)


def own_copy(model: nn.Module) -> nn.Module:
    """In float32, on the CPU and in eval mode; what is done to it leaves the caller's model alone."""
    copied = copy.deepcopy(model).to("cpu").eval()
    halves = any(p.dtype != torch.float32 for p in copied.parameters() if p.is_floating_point())
    copied = copied.float() if halves else copied
    config: Any = getattr(copied, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return copied
