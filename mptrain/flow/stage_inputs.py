"""What the result of a stage depends on: all that `run_phase` gets of a recipe, and the key under which it is reused.

A field that a stage reads is here, or it cannot be read: flow/stage.py sees no recipe. And what is here is in the key.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from pydantic import BaseModel

from mptrain.recipe import Data, MixedPrecision, Model, Recipe, Stage
from mptrain.recipe.target import Target, target


@dataclass(frozen=True)
class StageInputs:
    """start, teacher: "model", the id of a stage, or of a teacher also a path; None, there is none.

    peaks: examples with large activations are kept for an fp16 export. target, widths: see MethodConfig.reads; None
    where no method of the stage reads them. against: "model" or the stage whose model a budget counts against; None,
    where it starts. after: keys of the stages whose models it begins with, learns from or counts against. asked_once:
    the teacher says each time what it said before of an example, and this stage and those that share it ask more often.
    """

    stage: Stage
    start: str
    teacher: str | None
    model: Model
    data: Data
    precision: MixedPrecision
    seed: int
    peaks: bool
    target: Target | None
    against: str | None
    widths: tuple[int, ...] | None
    after: dict[str, str]
    asked_once: bool = False

    def key(self) -> dict[str, Any]:
        """In JSON types, without settings that are null and fields at their default: what a later version adds changes
        no stage that does without it. Stages of one key, on the same data, model files, versions and processes, give
        one model."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return given({name: json.loads(json.dumps(_plain(value))) for name, value in values.items()})

    def counted(self) -> str:
        """Names what a budget of the whole exported model counts against: the model, and the variant it becomes."""
        return f"{self.against or self.start} {json.dumps(_plain(self.target), sort_keys=True)}"

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.key(), sort_keys=True).encode()).hexdigest()


def given(key: dict[str, Any]) -> dict[str, Any]:
    """A key without the settings that are null."""
    return {name: _given(value) for name, value in key.items()}


def _given(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _given(inner) for name, inner in value.items() if inner is not None}
    return [_given(inner) for inner in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value.model_dump(mode="json", by_alias=True) if isinstance(value, BaseModel) else value


def inputs_of(recipe: Recipe) -> dict[str, StageInputs]:
    """The inputs of every stage, by its id."""
    found: dict[str, StageInputs] = {}
    often = _asked_once(recipe)
    for stage in recipe.stages:
        start, teacher = recipe.start_of(stage), _teacher(recipe, stage)
        reads = {name for method in stage.methods for name in method.reads()}
        against = None if stage.prune is None else stage.prune.against()
        found[stage.id] = StageInputs(
            stage=stage.model_copy(update={"start": start}),
            start=start,
            teacher=teacher,
            model=recipe.model,
            data=recipe.data,
            precision=recipe.precision,
            seed=recipe.seed,
            peaks=stage.train is not None and any("fp16" in export.precision for export in recipe.export),
            target=target(recipe, stage) if "target" in reads else None,
            widths=_widths(recipe, stage) if "widths" in reads else None,
            against=against,
            after={other: found[other].digest() for other in (start, teacher, against) if other in found},
            asked_once=stage.id in often,
        )
    return found


def _teacher(recipe: Recipe, stage: Stage) -> str | None:
    return recipe.start_of(stage) if stage.teacher == "self" else stage.teacher


def _asked_once(recipe: Recipe) -> set[str]:
    """The stages that compare outputs alone, on examples as they are, with a teacher that they and others like them
    would ask more than once about each."""
    alike: dict[tuple[str | None, str | None], list[Stage]] = {}
    for stage in recipe.stages:
        if stage.distill is not None and not stage.distill.inside and not stage.distill.replace_tokens:
            alike.setdefault((_teacher(recipe, stage), recipe.rewritten(recipe.start_of(stage))), []).append(stage)
    often = (stages for stages in alike.values() if sum(s.train.epochs for s in stages if s.train) > 1)
    return {stage.id for stages in often for stage in stages}


def _widths(recipe: Recipe, stage: Stage) -> tuple[int, ...]:
    """Bits of the tables that all targets of the stage store."""
    stored = [export.widths() for export in recipe.export if stage.id in export.of]
    return tuple(sorted(frozenset(range(1, 9)).intersection(*stored)))
