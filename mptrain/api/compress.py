"""`mptrain.compress`: what the stages of a recipe do, on a model in memory; trained where `trainer_args` are given."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainingArguments

from mptrain.api.given import given
from mptrain.api.phases import CALIBRATION, Compression
from mptrain.api.shown import Shown
from mptrain.core.errors import UserError
from mptrain.core.hooks import HOOKS
from mptrain.recipe import Recipe, Train, file
from mptrain.train import arguments
from mptrain.train.trainer import Trainer

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, repr=False)
class Compressed(Shown):
    """model: what came of it, in eval mode on the CPU. parameters: before and after. words: what was done. facts: of
    the methods, by stage and field, in JSON types. history: rows of the training log, by stage and step."""

    model: nn.Module
    parameters: tuple[int, int]
    words: tuple[str, ...]
    facts: dict[str, dict[str, Any]]
    history: tuple[dict[str, Any], ...]

    def _parts(self) -> Iterable[RenderableType]:
        from mptrain.report.render.compressed import compressed

        yield compressed(type(self.model).__name__, self.parameters, self.words, self.facts, self.history)


def compress(
    model: nn.Module,
    methods: Any,
    *,
    data: Any = None,
    trainer_args: TrainingArguments | None = None,
    teacher: nn.Module | str | os.PathLike | None = None,
    eval_data: Any = None,
    data_collator: Callable[..., Any] | None = None,
    calibration: int = CALIBRATION,
) -> Compressed:
    """Prune, quantize, palettize and distil a model, at once or while it trains; the one given is left alone.

    model: of transformers; without training also any module that maps named tensors to named tensors. methods: a word
    (int8, int8-weights, int4, palette1 … palette8); the fields of a recipe's stage, {"prune": {…}, "quantize": {…},
    "distill": {…}}; settings such as mptrain.recipe.Fisher(…), one or a list; or a recipe, by name, path or as
    `mptrain.recipe.file.read` gives it, whose stages run one after the other. data: batches or a data set, with targets
    where the methods train or need them; calibrates, and trains. trainer_args: mptrain.TrainingArguments of the whole
    training, in place of a recipe's `train`; none, nothing trains but stages of a recipe. teacher: of `distill`, a
    model, the folder of one or "self". eval_data, data_collator: as of a Trainer. calibration: inputs to calibrate on.

    - Shapes and dtypes: batches of tensors [batch, …] as the forward takes them; what comes back has its tensors in
      float32, integers and tables as records that `mptrain.save` and `mptrain.export` store.
    - Units: parameters; the history counts optimizer steps over all phases of a stage.
    - Raises UserError (ModelError, DataError) for settings, models and data that do not fit, before anything trains;
      TrainingError where a loss is not finite.
    - Source: the methods and the Trainer that runs of recipes use.
    """
    before = _count(model)
    facts: dict[str, dict[str, Any]] = {}
    words: list[str] = []
    history: list[dict[str, Any]] = []
    for name, fields in _stages(methods):
        settings = trainer_args if trainer_args is not None else _arguments(fields, data_collator)
        work = Compression(
            model,
            fields,
            data,
            trainer_args=settings,
            teacher="self" if teacher is None and getattr(fields, "teacher", None) else teacher,
            data_collator=data_collator,
            calibration=calibration,
        )
        while (phase := work.phase) is not None:
            if phase.steps:
                history += [{"stage": name, **row} for row in _train(work, eval_data)]
            work.boundary()
        model = work.model
        facts[name] = work.facts
        words += work.stage.words()
    return Compressed(model, (before, _count(model)), tuple(words), facts, tuple(history))


class _PhaseTrainer(Trainer):
    """The learning rate is a function of the step of the stage: a boundary does not restart it."""

    def __init__(self, *args: Any, start: int, total: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._start, self._total = start, total

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        scheduler = super().create_scheduler(self._total, optimizer)
        if self._start and isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            shifted = [_after(self._start, factor) for factor in scheduler.lr_lambdas]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(scheduler.optimizer, shifted)
        return self.lr_scheduler


def _after(start: int, factor: Callable[[int], float]) -> Callable[[int], float]:
    return lambda step: factor(start + step)


def _train(work: Compression, eval_data: Any) -> list[dict[str, Any]]:
    """The rows of the log of a phase."""
    phase = work.phase
    assert phase is not None
    rows, collate = work.dataset()
    trainer = _PhaseTrainer(
        work.model,
        work.arguments,
        train_dataset=rows,
        eval_dataset=None if eval_data is None else given(eval_data, "eval_data").dataset()[0],
        data_collator=collate,
        compressors=work.compressors,
        distiller=work.distiller,
        start=phase.start,
        total=phase.total,
    )
    trainer.train()
    work.model = trainer.release()
    return [
        {"phase": phase.name, **row, "step": phase.start + row["step"]}
        for row in trainer.state.log_history
        if "train_runtime" not in row
    ]


def _stages(methods: Any) -> list[tuple[str, Any]]:
    """Names, and what `Compression` takes."""
    if isinstance(methods, file.RecipeFile):
        methods = methods.recipe
    if isinstance(methods, str) and _is_recipe(methods):
        methods = file.read(methods, []).recipe
    if not isinstance(methods, Recipe):
        return [("stage", methods)]
    ids = [stage.id for stage in methods.stages]
    for before, stage in zip([None, *ids], methods.stages):
        if stage.start not in (None, "model" if before is None else before):
            raise UserError(
                f"methods: stage {stage.id} of the recipe starts from {stage.start}, and here each stage goes on where"
                f" the one before ended; give the fields of one stage, or run the recipe"
            )
        if stage.teacher not in (None, "self", before or "model"):
            raise UserError(
                f"methods: stage {stage.id} of the recipe learns from {stage.teacher}, which is not at hand here; give"
                " that stage's fields alone, with teacher=…"
            )
    return [(stage.id, stage) for stage in methods.stages]


def _is_recipe(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or name in {path.stem for path in file.bundled()}


def _arguments(fields: Any, collate: Any) -> TrainingArguments | None:
    """Of a stage of a recipe, its `train`; None where it does not train."""
    train = fields.get("train") if isinstance(fields, dict) else getattr(fields, "train", None)
    if train is None:
        return None
    settings = train if isinstance(train, Train) else Train.model_validate(train)
    on_cpu = not torch.accelerator.is_available()
    return arguments.TrainingArguments(
        "mptrain-output",
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        num_train_epochs=settings.epochs,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,
        save_strategy="no",
        **arguments.of_recipe(settings),
    )


def _count(model: nn.Module) -> int:
    """Parameters, without those of quantizers."""
    return sum(p.numel() for name, p in model.named_parameters() if HOOKS not in name)
