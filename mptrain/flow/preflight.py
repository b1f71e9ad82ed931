"""What can be known before any training is said before any training, by a run and by a dry run alike.

A pattern that matches no module, a budget that cannot be reached, an input that an export cannot
read: each would otherwise end a run after hours. `check_model` needs the model's config,
`check_data` the data; neither needs weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from mptrain.compress.prune.base import Warmup
from mptrain.compress.structure.budget import Budget
from mptrain.compress.structure.find import find_structure
from mptrain.compress.structure.scopes import resolve
from mptrain.core.errors import DataError, ModelError, UserError
from mptrain.core.pins import untested
from mptrain.data.load import Task
from mptrain.models.load import has_trained_head, read_config, skeleton
from mptrain.recipe import Keep, Ptq, Qat, Recipe, Stage
from mptrain.recipe.exports.base import compressed
from mptrain.recipe.plan import phases

log = logging.getLogger(__name__)


def check_exports(recipe: Recipe) -> None:
    """Raises ModuleNotFoundError for what an export needs and is missing, UserError for versions and weights that it
    does not take. Warns of versions whose private parts are not tested."""
    used = {"torch", "transformers"} | {package.name for export in recipe.export for package in export.packages}
    if any(isinstance(stage.quantize, Qat | Ptq) for stage in recipe.stages):
        used.add("nncf")
    for said in untested(sorted(used)):
        log.warning("%s", said)
    for export in recipe.export:
        export.check_installed()
        for stage_id in export.of:
            stage = recipe.stage(stage_id)
            for field, weights in compressed(stage):
                if (stored := export.stores(weights)).result == "refused":
                    raise UserError(f"stages.{stage.id}.{field}: export.{export.id} cannot hold it: {stored.how}.")


def model_of(recipe: Recipe, allow_code: bool = False) -> PreTrainedModel | None:
    """The recipe's model without weights; None where nothing is to be checked, or its code comes with it."""
    asked = any(stage.prune for stage in recipe.stages)
    asked = asked or any(patterns for stage in recipe.stages for _, patterns in _patterns(stage))
    if not asked or recipe.model.modeling is not None:
        return None
    return skeleton(recipe.model, read_config(recipe.model, allow_code), allow_code)


def check_model(recipe: Recipe, model: PreTrainedModel) -> None:
    """model: as of `model_of`. Raises UserError and its kinds, naming the field."""
    names = [name for name, _ in model.named_modules()]
    for stage in recipe.stages:
        for field, patterns in _patterns(stage):
            resolve(patterns, names, f"stages.{stage.id}.{field}")
        if stage.prune is not None:
            _check_pruning(recipe, stage, model)


def check_data(recipe: Recipe, data: Task, processes: int = 1) -> None:
    """Raises UserError and its kinds, naming the field."""
    for length in recipe.evaluate.latency.length:
        data.example(1, length)
    for stage in recipe.stages:
        for phase in phases(stage, len(data.train), processes):
            if stage.prune is not None and stage.prune.field in phase.methods:
                with _named(stage):
                    Warmup.of(stage.prune.schedule, phase_steps=phase.steps, steps_per_epoch=phase.steps_per_epoch)
    longest = max(length for split in (data.train, data.test) for length in split.lengths)
    for export in recipe.export:
        limit = export.longest()
        if limit is not None and longest > limit.tokens:
            raise DataError(
                f"export.{export.id}.{limit.field}: {limit.tokens} is less than the longest input, {longest}"
                f" {recipe.model.kind.unit or 'tokens'}; raise it, or lower"
                f" data.max_length (now {recipe.data.max_length})."
            )


def untrained(recipe: Recipe) -> list[str]:
    """Exported stages whose model no stage has trained: what the recipe starts from must have its head."""
    exported = dict.fromkeys(stage_id for export in recipe.export for stage_id in export.of)
    return [stage_id for stage_id in exported if not any(stage.train for stage in recipe.chain(stage_id))]


def check_head(recipe: Recipe, data: Task, allow_code: bool = False) -> None:
    """Raises ModelError for a model without a trained head that would be exported as it is, at random."""
    stages = untrained(recipe)
    if stages and recipe.model.kind.new_head and not has_trained_head(recipe.model, data.labels, allow_code):
        raise ModelError(
            f"model.path: {recipe.model.path} has no head that is trained"
            f"{f' for the classes {list(data.labels)}' if data.labels else ''}, and nothing trains one for"
            f" {', '.join(stages)}, which {'is' if len(stages) == 1 else 'are'} exported. Give a fine-tuned model, or a"
            " stage with train before."
        )


def _patterns(stage: Stage) -> Iterator[tuple[str, list[str]]]:
    quantize, palettize = stage.quantize, stage.palettize
    if quantize is not None:
        yield "quantize.ignore", quantize.ignore
        if isinstance(quantize, Qat | Ptq):
            yield "quantize.bits", list(quantize.bits)
        else:
            yield "quantize.overrides", list(quantize.overrides)
    if palettize is not None:
        yield "palettize.ignore", palettize.ignore
        yield "palettize.overrides", list(palettize.overrides)


def _check_pruning(recipe: Recipe, stage: Stage, model: PreTrainedModel) -> None:
    assert stage.prune is not None
    with _named(stage):
        structure = find_structure(model, ignore=stage.prune.ignore)
        keep: Keep | None = stage.prune.keep
        pruned_before = any(before.prune for before in recipe.chain(stage.id)[1:])
        text = recipe.model.kind.unit == "tokens"
        # a budget in milliseconds is measured, one in multiply-adds of images and sounds needs their sizes
        if keep is None or keep.latency is not None or (keep.macs is not None and not text) or pruned_before:
            return
        floors = {name: getattr(stage.prune, name) for name in ("min_heads", "min_ffn", "round_ffn")}
        Budget(structure, keep, length=recipe.data.max_length, **floors)


@contextmanager
def _named(stage: Stage) -> Iterator[None]:
    """Errors that begin with the name of a field say in which stage it is."""
    try:
        yield
    except UserError as error:
        text = str(error)
        raise type(error)(f"stages.{stage.id}.{text}" if text.startswith("prune.") else text) from None
