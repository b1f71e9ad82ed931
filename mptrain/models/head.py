"""The output layer of a model, fitted to the labels of the data: classes, or names of numbers.

Three cases: the head is new (the checkpoint is an encoder), the head has other classes than the data
(replaced by a new one of the right size), or it has the same classes in another order (rows permuted, so
that index i means the same class in the model and in the data).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from mptrain.core.errors import ModelError
from mptrain.recipe import TaskSpec

log = logging.getLogger(__name__)


def head_class(kind: TaskSpec) -> Any:
    """The class of transformers that loads a task's models. Raises ModelError for a task without one."""
    if kind.head is None:
        raise ModelError(f"model.task: transformers has no model for {kind.name}; give one as model.modeling.")
    return getattr(transformers, kind.head)


def fit_head(
    model: PreTrainedModel,
    labels: Sequence[str],
    missing: Collection[str],
    *,
    new_head: bool,
    problem: Any = "single_label_classification",
) -> None:
    """Make output i the class labels[i], in place; sets num_labels, id2label, label2id and problem_type.

    missing: parameter names that the checkpoint did not have. problem: as transformers calls it. Raises ModelError
    when no output layer is found, or when new_head is False and the head does not already tell these classes apart.
    """
    config = model.config
    name, layer = _output_layer(model)
    theirs = [str(label) for _, label in sorted((config.id2label or {}).items())]
    is_new = f"{name}.weight" in missing
    named = [label.casefold() for label in theirs]
    wanted = [label.casefold() for label in labels]
    default = all(label == f"label_{i}" for i, label in enumerate(named))
    if len(theirs) != len(labels):
        _require(new_head, theirs, labels)
        _replace(model, name, layer, len(labels))
    elif is_new:
        _require(new_head, theirs, labels)
    elif named != wanted and sorted(named) == sorted(wanted):
        order = torch.tensor([named.index(label) for label in wanted])
        with torch.no_grad():
            layer.weight.copy_(layer.weight[order])
            if layer.bias is not None:
                layer.bias.copy_(layer.bias[order])
    elif len(labels) > 1 and named != wanted and not default and not all(label.isdecimal() for label in wanted):
        # Numbers stand for positions; other names that differ may well stand for other classes.
        _require(new_head, theirs, labels)
        log.warning("model: its classes %s are taken by position for the data's %s", theirs, list(labels))
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    config.problem_type = problem
    if hasattr(model, "num_labels"):
        model.num_labels = len(labels)  # type: ignore[assignment]


def drop_pooler(model: nn.Module) -> None:
    """Take out of an encoder what only a head would read: it would train for nothing, and be a second output."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # type: ignore[assignment]


def _output_layer(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """The last linear layer outside the base model with one output per class."""
    base = f"{model.base_model_prefix}."
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == model.config.num_labels
        and not name.startswith(base)
    ]
    if not found:
        raise ModelError(
            f"model: {type(model).__name__} has no linear output layer with {model.config.num_labels} classes, so its"
            " head cannot be fitted to the labels of the data. Use a model with a plain classification head."
        )
    return found[-1]


def _replace(model: PreTrainedModel, name: str, old: nn.Linear, outputs: int) -> None:
    new = nn.Linear(old.in_features, outputs, bias=old.bias is not None)
    model._init_weights(new)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)


def _require(new_head: bool, theirs: Sequence[str], labels: Sequence[str]) -> None:
    if not new_head:
        raise ModelError(
            f"model: a model that is already trained on the data's classes {list(labels)} is needed here (a teacher, or"
            f" a model to score), but this one tells {theirs} apart or has an untrained head. Fine-tune it first, or"
            " rename its classes in id2label of its config.json."
        )
