"""A torch module of a user's own as the model of a recipe: `model.module`, FILE:NAME.

    NAME       a class or function in FILE that gives the module. It gets model.arguments by name and, where it takes
               `num_labels`, the number of classes of the data; weights are as it leaves them
    inputs     those of the task: `pixel_values` [batch, channels, height, width] of pictures, `input_ids` and
               `attention_mask` [batch, tokens] of texts, `input_values` [batch, samples] of sounds. By name where its
               forward has these names, else one after the other
    outputs    one tensor, or a mapping of names to tensors with the task's output among them (`TaskSpec.output`)
    loss       by the labels of the data, here; it is given none

`OwnModel` is what the rest knows of it: a model of transformers, whose only child, `module`, is the user's. Saved, the
file lies beside its weights, and is run again when it is loaded. Code of a user runs only where that is allowed, which
`folder.locate` and `artifact.load` see to.
"""

from __future__ import annotations

import importlib.util
import inspect
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from mptrain.core.disk import sha256
from mptrain.core.errors import ModelError
from mptrain.data.load import task_class
from mptrain.models.folder import config_json
from mptrain.recipe import Model

INPUTS = {"image": ("pixel_values",), "tokenizer": ("input_ids", "attention_mask"), "audio": ("input_values",)}
"""of a model, by the processor of its task"""
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "single_label_classification": lambda found, labels: cross_entropy(found.flatten(0, -2), labels.flatten()),
    "multi_label_classification": lambda found, labels: binary_cross_entropy_with_logits(found, labels.to(found)),
    "regression": lambda found, labels: mse_loss(found.squeeze(-1), labels.to(found)),
}
"""by `problem_type`"""
_classes: dict[tuple[str, str], type[OwnModel]] = {}


class OwnConfig(PreTrainedConfig):
    """arguments: of the function. inputs, output: names. task: of TASKS. image_size: [height, width] of pictures."""

    model_type = "mptrain-module"

    def __init__(
        self,
        arguments: dict[str, Any] | None = None,
        inputs: Sequence[str] = INPUTS["image"],
        output: str = "logits",
        task: str = "",
        **others: Any,
    ) -> None:
        self.arguments, self.inputs, self.output, self.task = dict(arguments or {}), list(inputs), output, task
        super().__init__(**others)


class OwnModel(PreTrainedModel):
    """Of a file; `class_of` makes its class."""

    config_class = OwnConfig
    build: ClassVar[Callable[..., Any]]
    file: ClassVar[Path]
    function: ClassVar[str]

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.main_input_name = config.inputs[0]
        self.module = _built(type(self), config)
        self._named = set(config.inputs) <= set(inspect.signature(self.module.forward).parameters)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The function has done it."""

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ModelOutput:
        given = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
        given["input_values"] = input_values
        if input_ids is not None and attention_mask is None:
            given["attention_mask"] = torch.ones_like(input_ids)
        inputs = {name: given[name] for name in self.config.inputs}
        found = self.module(**inputs) if self._named else self.module(*inputs.values())
        if isinstance(found, Tensor):
            found = {self.config.output: found}
        if labels is None:
            return ModelOutput(found)
        return ModelOutput({"loss": LOSSES[str(self.config.problem_type)](found[self.config.output], labels), **found})

    def keep_code(self, folder: Path) -> str:
        """Put its file into a folder; what `class_at` finds it by."""
        shutil.copy(self.file, folder / self.file.name)
        return f"{self.file.name}:{self.function}"


def class_of(file: Path, function: str) -> type[OwnModel]:
    """The class of the models that a function in a file builds, one for each content of the file. Raises ModelError."""
    key = (_hash(file), function)
    if key not in _classes:
        source = run_file(file, f"mptrain_module_{file.stem}_{key[0][:8]}", "model.module")
        build = getattr(source, function, None)
        if not callable(build):
            known = [
                n for n, v in vars(source).items() if callable(v) and getattr(v, "__module__", "") == source.__name__
            ]
            raise ModelError(
                f"model.module: {file.absolute()} defines no {function!r} that can be called; it defines"
                f" {', '.join(known) or 'nothing'}."
            )
        members = {"build": staticmethod(build), "function": function, "__module__": source.__name__}
        _classes[key] = type("OwnModel", (OwnModel,), members)
    _classes[key].file = file  # where it lies now
    return _classes[key]


def class_at(folder: Path, code: str) -> type[OwnModel]:
    """Of what `keep_code` left. Raises ModelError."""
    name, _, function = code.partition(":")
    return class_of(folder / Path(name).name, function)


def class_in(folder: Path, allow_code: bool) -> type[OwnModel] | None:
    """Of a folder that a model was saved to; None for models of other kinds. Raises ModelError."""
    if not (folder / "config.json").is_file():
        return None
    ours = config_json(folder).get("mptrain")
    code = ours.get("code", "") if isinstance(ours, dict) else ""
    if ":" not in code:
        return None
    if not allow_code:
        raise ModelError(
            f"model.path: {folder} is built by code that it holds, {code}. Read it, then add --allow-code."
        )
    return class_at(folder, code)


def config_of(spec: Model, image_size: Sequence[int] | None = None) -> OwnConfig:
    """Raises ModelError for a task whose loss is not known of such a model."""
    kind = spec.kind
    if kind.processor is None or (not task_class(kind).computes_loss() and kind.problem not in LOSSES):
        raise ModelError(
            f"model.module: what a module of one's own learns from for task {spec.task} is not known here; give a model"
            " of transformers, or a subclass of PreTrainedModel that computes its loss (model.modeling)."
        )
    known: dict[str, Any] = {} if image_size is None else {"image_size": list(image_size)}
    known |= {"inputs": INPUTS[kind.processor], "output": kind.output, "task": spec.task}
    return OwnConfig(arguments=spec.arguments, problem_type=kind.problem, **known)


@torch.no_grad()
def check(model: OwnModel, labels: Sequence[str] | None) -> None:
    """Runs it on a picture, where it reads such. Raises ModelError for a model that does not fit its task and data."""
    config, size = model.config, getattr(model.config, "image_size", None)
    if size is None:
        return
    where = f"model.module: {model.file.name}:{model.function}"
    try:
        found = model.eval()(torch.zeros(2, 3, *size))
    except Exception as error:
        raise ModelError(f"{where} does not run on pictures [2, 3, {size[0]}, {size[1]}]: {error}") from error
    value = found.get(config.output)
    if not isinstance(value, Tensor) or value.shape[:1] != (2,):
        raise ModelError(
            f"{where} gives {', '.join(found) or 'nothing'}, and its task needs {config.output!r} [batch, …]: return"
            " one tensor, or a mapping with that name."
        )
    if labels is not None and tuple(value.shape) != (2, len(labels)):
        raise ModelError(
            f"{where} gives {config.output} {list(value.shape)} for 2 pictures, and the data has {len(labels)} classes:"
            " take num_labels as an argument, and give so many numbers for each."
        )


def run_file(file: Path, name: str, field: str) -> ModuleType:
    """Run a local .py file as the module `name`. field: for errors. Raises ModelError."""
    source = importlib.util.spec_from_file_location(name, file)
    if source is None or source.loader is None:
        raise ModelError(f"{field}: {file.absolute()} is not a Python file (.py).")
    module = importlib.util.module_from_spec(source)
    sys.modules[name] = module  # dataclasses and pickling look their module up
    try:
        source.loader.exec_module(module)
    except Exception as error:
        raise ModelError(f"{field}: {file.absolute()} failed: {type(error).__name__}: {error}") from error
    return module


def _built(cls: type[OwnModel], config: OwnConfig) -> nn.Module:
    arguments: dict[str, Any] = dict(config.arguments)
    where = f"model.module: {cls.file.name}:{cls.function}"
    if "num_labels" in inspect.signature(cls.build).parameters:
        arguments.setdefault("num_labels", config.num_labels)
    try:
        module = cls.build(**arguments)
    except TypeError as error:
        raise ModelError(f"{where} does not take model.arguments {arguments}: {error}") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{where} gives {type(module).__name__}, no torch.nn.Module.")
    return module


def _hash(file: Path) -> str:
    try:
        return sha256(file)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror}).") from None
