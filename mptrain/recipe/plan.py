"""What a recipe will do, before it does it: the phases of every stage, in optimizer steps.

A stage is one phase, or two when masks grow during a warm-up: `warmup` ends at the
boundary, where the model is shrunk, and `finetune` trains the shrunk model. The learning
rate is a function of the step of the stage, so a boundary does not restart it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mptrain.core.errors import RecipeError
from mptrain.recipe import ExportSpec, Recipe, Schedule, Stage, Train
from mptrain.recipe.method import MethodConfig


@dataclass(frozen=True)
class Phase:
    """Steps [start, end) of a stage; `end == start` is a phase without training."""

    stage: str
    index: int
    name: str
    start: int
    end: int
    total: int
    steps_per_epoch: int
    methods: tuple[str, ...]
    """fields of the stage whose methods are prepared when it begins and finalized when it ends"""

    @property
    def steps(self) -> int:
        return self.end - self.start

    @property
    def folder(self) -> str:
        return f"stages/{self.stage}/{self.index}-{self.name}"


def steps_per_epoch(rows: int, train: Train, world_size: int = 1) -> int:
    """Optimizer steps in one epoch; the last short batch is dropped unless it is the only one."""
    batches = rows // train.batch_size if rows >= train.batch_size * world_size else world_size
    return max(1, math.ceil(batches // world_size / train.accumulation))


def phases(stage: Stage, rows: int, world_size: int = 1) -> list[Phase]:
    """The phases of a stage for a training split of `rows` examples. Raises RecipeError for a longer warm-up."""
    per_epoch = steps_per_epoch(rows, stage.train, world_size) if stage.train else 1
    total = max(1, round(stage.train.epochs * per_epoch)) if stage.train else 0

    def phase(index: int, name: str, start: int, end: int, methods: list[MethodConfig]) -> Phase:
        return Phase(stage.id, index, name, start, end, total, per_epoch, tuple(method.field for method in methods))

    if stage.prune is None:
        name = "train" if stage.train else stage.methods[0].field
        return [phase(0, name, 0, total, stage.methods)]
    end = _end_of_warmup(stage.id, stage.prune.schedule, total, per_epoch)
    name = "warmup" if end else "prune"
    if not stage.train:
        return [phase(0, name, 0, end, stage.methods)]
    early = [method for method in stage.methods if method.early()]
    late = [method for method in stage.methods if not method.early()]
    return [phase(0, name, 0, end, early), phase(1, "finetune", end, total, late)]


def _end_of_warmup(stage_id: str, schedule: Schedule, total: int, per_epoch: int) -> int:
    """In steps; epochs, which end before the training does, may round to all its steps."""
    if schedule.unit == "epoch":
        return min(round(schedule.end * per_epoch), max(total - 1, 0))
    end = round(schedule.end)
    if 0 < total <= end:
        raise RecipeError(
            f"stages.{stage_id}.prune.schedule.end ({end} steps) must be less than the {total} steps of the stage"
            f" ({per_epoch} to an epoch): the shrunk model needs fine-tuning. Lower it, or raise"
            f" stages.{stage_id}.train.epochs."
        )
    return end


@dataclass(frozen=True)
class Planned:
    """A variant to export: a stage in a precision, through an entry of the recipe's `export`."""

    id: str
    stage: str
    precision: str
    export: ExportSpec


def variants(recipe: Recipe) -> list[Planned]:
    """Everything that is exported, in order.

    `recipe.baseline` is called so. A stage has the precisions of its export's `precisions`; where the format
    drops the quantizers of a pruned stage, as OpenVINO does in fp32, the variant is `pruned_fp32`: the pruned
    structure alone. Raises RecipeError for an export of no stage or of a stage that has none of its precisions,
    and for two variants with one id.
    """
    found: dict[str, Planned] = {}
    for export in recipe.export:
        if not export.of:
            stages = [s.id for s in recipe.stages]
            raise RecipeError(
                f"export.{export.id}.of: names no stage, got []; give some of {stages}, or drop the export."
            )
        for stage_id in export.of:
            stage = recipe.stage(stage_id)
            for precision in _fitting(export, stage):
                name = "baseline" if stage_id == recipe.baseline else stage_id
                structure_alone = export.drops_quantizers(precision) and stage.reshapes and stage.quantizes
                if structure_alone and name != "baseline":
                    name = "pruned" if _only_pruned(recipe, stage) else f"{stage_id}_pruned"
                variant = export.variant(name, precision)
                twin = found.setdefault(variant, Planned(variant, stage_id, precision, export))
                # what two exports with the same settings both ask for is one model
                if (twin.stage, twin.precision, _settings(twin.export)) != (stage_id, precision, _settings(export)):
                    raise RecipeError(
                        f"export.{export.id}: stage {stage_id} in {precision} would be the variant {variant!r}, which"
                        f" stage {twin.stage} of export.{twin.export.id} is; give a stage or an export another id."
                    )
    return list(found.values())


def _settings(export: ExportSpec) -> dict[str, Any]:
    return export.model_dump(exclude={"id", "of", "precision"})


def _fitting(export: ExportSpec, stage: Stage) -> list[str]:
    """The precisions of an export that a stage can have."""
    possible = export.precisions(stage)
    found = [precision for precision in export.precision if precision in possible]
    if not found:
        raise RecipeError(
            f"export.{export.id}.precision: stage {stage.id} has none of [{', '.join(export.precision)}]; it can be"
            f" {' or '.join(possible)}: add one, or take {stage.id} out of export.{export.id}.of."
        )
    return found


def _only_pruned(recipe: Recipe, stage: Stage) -> bool:
    return [s.id for s in recipe.stages if s.reshapes and s.quantizes] == [stage.id]
