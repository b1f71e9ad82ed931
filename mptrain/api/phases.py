"""The methods of a stage on a model in memory, phase by phase, for a training loop of your own.

phases      one, or two where masks grow during a warm-up (recipe/plan.py)
boundary    the phase ends: its methods finish, what is masked is cut, and those of the next phase begin
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from pydantic import ValidationError
from torch import nn
from transformers import TrainingArguments

from mptrain.api.given import Collator, Given, given, inputs_of, kind_of
from mptrain.commands.compressions import WORDS
from mptrain.compress.base import Batch, Method, Site, Tools, TrainingMethod
from mptrain.compress.methods import acting, finalized, methods_of, prepared, stand_still
from mptrain.core.errors import UserError
from mptrain.core.hooks import is_quantized
from mptrain.core.pins import warn_untested
from mptrain.data.tasks import divergence
from mptrain.export.target import opened
from mptrain.models.artifact import load
from mptrain.recipe import Distill, MethodConfig, Stage
from mptrain.recipe.plan import Phase, phases
from mptrain.recipe.plan import steps_per_epoch as planned_per_epoch
from mptrain.recipe.target import quantizer, stand_in
from mptrain.train.distill import TARGETS, Distiller

CALIBRATION = 128
"""inputs, as of `mptrain export`"""


@dataclass(frozen=True)
class Length:
    """Of the training: optimizer steps, and those of an epoch."""

    steps: int
    per_epoch: int


class Compression:
    """What a stage of a recipe does besides training, on a model in memory: `compressors` and `distiller` for each
    training, and `boundary()` after it.

    model: of transformers, or any module of named tensors; a copy is worked on, `model` is it. methods: as of
    `mptrain.compress`. data: batches or a data set, which calibrate and say how long an epoch is. trainer_args: of the
    whole training, of which `arguments` are those of one phase. teacher: a model, the folder of one, or "self" (the
    model as it is now), for `distill`. data_collator: makes batches of a data set. calibration: inputs to calibrate on.

    - Shapes and dtypes: batches of tensors [batch, …] as the forward takes them, targets beside the inputs; float32.
    - Units: optimizer steps; the learning rate is that of trainer_args.
    - Raises UserError (ModelError, DataError) for settings, models and data that do not fit, before anything is
      changed.
    - Source: `compress.methods`, as runs of recipes use it.
    """

    def __init__(
        self,
        model: nn.Module,
        methods: Any,
        data: Any = None,
        *,
        trainer_args: TrainingArguments | None = None,
        teacher: nn.Module | str | os.PathLike | None = None,
        data_collator: Callable[..., Any] | None = None,
        calibration: int = CALIBRATION,
    ) -> None:
        self._data = None if data is None else given(data, "data", data_collator)
        self._asked, self._calibration = trainer_args, calibration
        length = None if trainer_args is None else _length(trainer_args, self._given("trainer_args"))
        lr = None if trainer_args is None else trainer_args.learning_rate
        self.stage = stage_of(methods, length, lr, teacher, data=data is not None)
        self.phases = _phases(self.stage, length)
        self._kind = kind_of(model, None)
        self.model = copy.deepcopy(model)
        self.facts: dict[str, Any] = {}
        self._check()
        self.distiller = self._distiller(model, teacher)
        self._index = -1
        self._methods: list[Method[Any]] = []
        self._next()

    @property
    def phase(self) -> Phase | None:
        """The one that has begun; None after the last boundary."""
        return self.phases[self._index] if self._index < len(self.phases) else None

    @property
    def compressors(self) -> list[TrainingMethod]:
        """Of the phase, for `mptrain.Trainer(compressors=…)`."""
        return acting(self._methods) if self.phase is not None and self.phase.steps else []

    @property
    def arguments(self) -> TrainingArguments:
        """`trainer_args` for the phase: with its steps, and a folder of its own. Raises UserError without them."""
        if self._asked is None or self.phase is None:
            raise UserError("trainer_args: arguments of a phase are those of a training; give trainer_args")
        found = copy.copy(self._asked)
        found.max_steps = self.phase.steps
        if len(self.phases) > 1:
            found.output_dir = os.path.join(str(found.output_dir), self.phase.name)
        return found

    def boundary(self) -> nn.Module:
        """End the phase, cut what is masked, begin the next; the model, another object than before.

        After the last phase it is done, in eval mode on the CPU. Raises UserError where all phases are over.
        """
        if self.phase is None:
            raise UserError("boundary: all phases of this compression are over; its model is done")
        tools = self._tools(self.phase)
        self.model = finalized(self._methods, self.model.to("cpu"), tools)
        self.facts |= {method.config.field: method.facts() for method in self._methods}
        self._next()
        return self.model

    # -- within

    def _next(self) -> None:
        self._index += 1
        phase = self.phase
        self._methods = [] if phase is None else methods_of(getattr(self.stage, name) for name in phase.methods)
        if phase is None:
            stand_still(self.stage.methods, self.model.eval(), still=False)
            return
        if self._methods:
            self.model = prepared(self._methods, self.model, self._tools(phase))
        stand_still(self.stage.methods, self.model)

    def _check(self) -> None:
        """Before anything is changed."""
        warn_untested(["torch", "transformers", *(name for method in self.stage.methods for name in method.packages)])
        example = None if self._data is None else self._inputs()[0]
        if self.stage.prune is not None and self.stage.prune.against() is not None:
            raise UserError(
                f"prune.keep.against: {self.stage.prune.against()} is a stage of a recipe, which is not at hand here;"
                " drop it, and the budget counts against the model as it is given, or run the recipe"
            )
        for method in methods_of(self.stage.methods):
            config, field = method.config, method.config.field
            if config.needs() and self._data is None:
                raise UserError(f"data: {config.words()} calibrates on real inputs; give batches or a data set")
            site = Site.beside(config, self.stage.methods, length=_tokens(example), example=example)
            method.check(config, self.model, replace(site, quantized=site.quantized or is_quantized(self.model)))
            for phase in self.phases:
                if field in phase.methods and phase.steps:
                    method.check_steps(config, phase.steps, phase.steps_per_epoch)

    def _distiller(self, model: nn.Module, teacher: Any) -> Distiller | None:
        if self.stage.distill is None:
            return None
        if isinstance(teacher, nn.Module):
            found = teacher
        else:
            found = copy.deepcopy(model) if teacher == "self" else load(teacher)
        term = partial(divergence.of_logits, causal=self._kind.causal)
        return Distiller(found, self.stage.distill, term=term, targets=self._kind.targets or TARGETS)

    def dataset(self) -> tuple[Sequence[Any], Collator]:
        """Examples to train on, and what makes batches of them. Raises UserError."""
        return self._given("training").dataset()

    def _given(self, what: str) -> Given:
        if self._data is None:
            raise UserError(f"data: {what} needs it; give batches or a data set")
        return self._data

    def _labelled(self) -> list[Batch]:
        return self._given("this method").labelled(self._calibration)

    def _inputs(self) -> list[Batch]:
        return inputs_of(self.model, self._labelled(), self._kind, "data")

    def _tools(self, phase: Phase) -> Tools:
        # where the training will be; without one, where the model is
        device = next(self.model.parameters()).device if self._asked is None else self._asked.device
        extent = _tokens(None if self._data is None else self._inputs()[0])
        return Tools(
            inputs=self._inputs,
            labelled=lambda: [{n: v.to(device) for n, v in batch.items()} for batch in self._labelled()],
            example=lambda: {name: value[:1] for name, value in self._inputs()[0].items()},
            length=extent or 128,
            seed=0 if self._asked is None else self._asked.seed,
            steps=phase.steps,
            steps_per_epoch=phase.steps_per_epoch,
            lr=0.0 if self._asked is None else self._asked.learning_rate,
            runtime=partial(opened, stand_in(quantizer([self.stage]), torch.get_num_threads())),
            device=device,
        )


def stage_of(
    methods: Any, length: Length | None = None, lr: float | None = None, teacher: Any = None, *, data: bool = False
) -> Stage:
    """What is asked as a stage. methods: a word of `mptrain export` (int8, int4, palette4, …), the fields of a stage as
    a mapping, a Stage, settings of one method, or a list of settings. data: whether there are inputs to calibrate on.
    Raises UserError."""
    if isinstance(methods, str):
        if methods not in WORDS:
            raise UserError(
                f"methods: {methods!r} is not known; give one of {', '.join(WORDS)}, a recipe, or the fields of a stage"
                " such as {'quantize': {'mode': 'ptq'}}"
            )
        word = WORDS[methods]
        methods = {word.field: word.given(data)}
    if isinstance(methods, Stage):
        methods = {name: getattr(methods, name) for name in methods.model_fields_set - {"id"}}
    if isinstance(methods, MethodConfig | Distill):
        methods = [methods]
    if isinstance(methods, Mapping):
        fields = dict(methods)
    elif isinstance(methods, Iterable):
        fields = {_field(one): one for one in methods}
    else:
        raise UserError(f"methods: must be a word, a stage or settings of methods, got {type(methods).__name__}")
    fields = {name: value for name, value in fields.items() if name not in ("train", "from", "start")}
    if teacher is not None or "distill" in fields:
        fields["teacher"] = "self" if teacher is not None else fields.get("teacher")
    if length is not None:
        fields["train"] = {"epochs": length.steps / length.per_epoch, "lr": lr}
    try:
        return Stage.model_validate({"id": "stage"} | fields)
    except ValidationError as error:
        said = "; ".join(": ".join([*filter(None, [_place(e["loc"])]), _said(e["msg"])]) for e in error.errors())
        raise UserError(f"methods: {said}") from None


def _said(message: str) -> str:
    """In words of this call: a stage's `train` is its trainer_args."""
    message = message.removeprefix("Value error, ")
    return re.sub(r"\b(needs?) train\b(: give epochs and lr)?", r"\1 trainer_args", message)


def _place(location: Iterable[Any]) -> str:
    return ".".join(map(str, location))


def _field(settings: Any) -> str:
    if isinstance(settings, Distill):
        return "distill"
    if isinstance(settings, MethodConfig):
        return settings.field
    raise UserError(
        f"methods: {type(settings).__name__} is no settings of a method; give e.g. mptrain.recipe.Qat(mode='qat')"
    )


def _length(arguments: TrainingArguments, data: Given) -> Length:
    """As transformers counts: the last short batch and the last short accumulation are steps too."""
    rows = len(data.dataset()[0])
    world, whole = PartialState().num_processes, arguments.dataloader_drop_last
    batches = rows / (arguments.train_batch_size * world)
    count = math.floor(batches) if whole else math.ceil(batches)
    per_epoch = max(1, math.ceil(count / arguments.gradient_accumulation_steps))
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * per_epoch)
    return Length(max(1, steps), per_epoch)


def _phases(stage: Stage, length: Length | None) -> list[Phase]:
    if stage.train is None or length is None:
        return phases(stage, 0)
    rows = length.per_epoch * stage.train.batch_size * stage.train.accumulation
    assert planned_per_epoch(rows, stage.train) == length.per_epoch
    return phases(stage, rows)


def _tokens(example: Batch | None) -> int | None:
    """Of an input; None where inputs are not tokens."""
    value = None if example is None else next(iter(example.values()))
    return (
        value.shape[1] if value is not None and value.dim() == 2 and value.dtype in (torch.int32, torch.int64) else None
    )
