"""What can be known before any training is said before any training: one function, for a run and a dry run alike.

A pattern that matches no module, a budget that cannot be reached, an input that an export cannot read, a package of
a version that nobody tried: each would otherwise end a run after hours. What needs no model comes first, then what
needs the model without its weights, then what needs the data. Everything raises UserError or one of its kinds, naming
the field; only a package that is missing is a ModuleNotFoundError, of which the command line makes a message.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from mptrain.compress.base import Site
from mptrain.compress.methods import method_class
from mptrain.core.errors import DataError, ExportError, ModelError, UserError
from mptrain.core.host import adds_int8_in_16_bits
from mptrain.core.pins import warn_untested
from mptrain.core.signature import Batch, Signature
from mptrain.data.lm_eval.questions import MultipleChoice, context_length, read_tasks
from mptrain.data.load import Task
from mptrain.export.base import Foreseeing
from mptrain.export.formats import format_of
from mptrain.export.torch.cached_decoder import check_decoder
from mptrain.export.torch.cached_decoder import check_exports as check_caches
from mptrain.export.torch.complex_numbers import check_real_form
from mptrain.export.torch.heads import check_vocabulary, signature_with
from mptrain.flow import input_checks
from mptrain.flow.inputs import Architecture, Inputs, on_this_machine, read_architecture, read_data, read_processor
from mptrain.models.folder import has_weights
from mptrain.models.load import has_trained_head
from mptrain.models.positions import positions_of
from mptrain.models.probe import blank, probe
from mptrain.recipe import Recipe
from mptrain.recipe.data import TRACKERS
from mptrain.recipe.plan import phases
from mptrain.recipe.target import target
from mptrain.train.distill import check_asked, check_terms

log = logging.getLogger(__name__)

TRACED = 16
"""tokens of a converter's example, or of a sound frames"""


def check(recipe: Recipe, *, allow_code: bool = False, processes: int = 1, offline: bool = False) -> Inputs:
    """The inputs of the recipe, all of them checked. offline: nothing is downloaded, and what is not on this machine
    is left unchecked.
    """
    check_exports(recipe)
    check_trackers(recipe)
    found = read_architecture(recipe, allow_code=allow_code, offline=offline)
    check_caches(recipe, found.config)
    check_decoders(recipe, found, allow_code)
    if found.known and found.model is not None:
        check_model(recipe, found.model)
    processor = read_processor(recipe.model, allow_code=allow_code, offline=offline)
    data = read_data(recipe, processor, allow_code=allow_code, offline=offline)
    if data is not None:
        check_data(recipe, data, processes)
        if found.known:
            input_checks.check(recipe, data, found.config, allow_code=allow_code, offline=offline)
            check_convertible(recipe, data, found.config, allow_code)
            check_distilled(recipe, data, found.config, allow_code)
        check_head(recipe, data, allow_code, offline)
    if processor is not None:
        check_processor(recipe, processor)
    questions = [] if processor is None else read_questions(recipe, found.config, processor, offline=offline)
    return Inputs(found, processor, data, questions)


def check_exports(recipe: Recipe) -> None:
    """What an export needs and is missing, versions and weights that it does not take. Warns of versions whose
    private parts are not tested."""
    used = {"torch", "transformers"} | {package.name for export in recipe.export for package in export.packages}
    methods = [method for stage in recipe.stages for method in stage.methods]
    used |= {name for method in methods for name in method.packages}
    warn_untested(sorted(used))
    for name in sorted({name for method in methods for name in method.packages}):
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    _warn_saturating(recipe)
    for export in recipe.export:
        export.check_installed()
        for stage_id in export.of:
            stage = recipe.stage(stage_id)
            for field, weights in stage.leaves():
                if (stored := export.stores(weights)).result == "refused":
                    raise UserError(f"stages.{stage.id}.{field}: export.{export.id} cannot hold it: {stored.how}.")


def _warn_saturating(recipe: Recipe) -> None:
    """Of int8 weights whose products exceed what this CPU adds them in."""
    stages = [s.id for s in recipe.stages if any(weights.saturates for _, weights in s.leaves())]
    if stages and adds_int8_in_16_bits():
        log.warning(
            "stages.%s.quantize: this CPU has neither VNNI nor AMX and adds int8 products in 16 bits, which 8-bit"
            " weights exceed: int8 exports give other numbers here than on CPUs that have them. Where they are to run"
            " on such CPUs, reduce_range: true makes them right.",
            stages[0],
        )


def check_decoders(recipe: Recipe, found: Architecture, allow_code: bool = False) -> None:
    """Exports with a cache need a model that keeps keys and values, and nothing else; the architecture tells."""
    cached = [export for export in recipe.export if export.cache is not None]
    if not cached or not found.known or recipe.model.own_code:
        return
    model = probe(recipe.model, found.config, allow_code)
    if model is None:
        return
    try:
        check_decoder(model)
    except UserError as error:
        raise type(error)(f"export.{cached[0].id}.cache: {error}") from None


def check_trackers(recipe: Recipe) -> None:
    """What is to get the logs of training is installed."""
    for stage in recipe.stages:
        for name in stage.train.report_to if stage.train else ():
            if find_spec(name) is None:
                raise UserError(
                    f"stages.{stage.id}.train.report_to: {name} is not installed: pip install {TRACKERS[name]}, or take"
                    " it out."
                )


def check_model(recipe: Recipe, model: PreTrainedModel) -> None:
    """What the methods of every stage and the exports ask of the model.

    model: without weights, as the recipe starts from it.
    """
    text = recipe.model.kind.unit == "tokens"
    held = positions_of(model) if text else None
    for export in recipe.export:
        limit = export.longest()
        if held is not None and limit is not None and limit.tokens > held.tokens:
            raise DataError(
                f"export.{export.id}.{limit.field}: {limit.tokens} is more than the {held.tokens} tokens that the model"
                f" reads ({held.why}); give at most {held.tokens}."
            )
        if recipe.model.kind.causal:
            check_vocabulary(export.heads, model.config, f"export.{export.id}.")
    dense = not hasattr(model.config, "mptrain_structure")
    for stage in recipe.stages:
        before = [method for earlier in recipe.chain(stage.id)[1:] for method in earlier.methods]
        for method in stage.methods:
            length = recipe.data.max_length if text else None
            stored = target(recipe, stage).bytes if "bytes" in method.reads() else None
            causal = recipe.model.kind.causal
            site = Site.beside(method, stage.methods, before, length=length, causal=causal, bytes=stored)
            site = site if dense else replace(site, exact=False)
            with _in_stage(stage.id, method.field):
                method_class(method).check(method, model, site)


def check_processor(recipe: Recipe, processor: Any) -> None:
    """What the methods of every stage ask of the model's tokenizer, or other processor."""
    for stage in recipe.stages:
        for method in stage.methods:
            with _in_stage(stage.id, method.field):
                method_class(method).check_processor(method, processor)


def check_convertible(recipe: Recipe, data: Task, config: PreTrainedConfig, allow_code: bool = False) -> None:
    """The architecture, small and with random weights, goes through what each format can say of it before training."""
    if not recipe.export or recipe.model.kind.head is None or not any(stage.train for stage in recipe.stages):
        return  # without training the export itself is soon there
    own = recipe.model.own_code
    foreseeing = [export for export in recipe.export if export.foresees == "all" or (own and export.foresees)]
    if not own and not foreseeing:
        return  # models of transformers compute with real numbers, or convert as they are
    example, signature = data.example(2, TRACED * data.min_length), data.signature()
    model = (blank if own else probe)(recipe.model, config, allow_code)
    if model is None:
        return
    if own:
        _check_complex(model, example, signature)
    for export in foreseeing:
        try:
            cast(Foreseeing, format_of(export)).check(model, example, signature)
        except ExportError as error:
            raise ModelError(f"export.{export.id}: {error}") from None


def check_distilled(recipe: Recipe, data: Task, config: PreTrainedConfig, allow_code: bool = False) -> None:
    """A small model with random weights gives what `distill` compares inside of models."""
    inside = [(s, s.distill) for s in recipe.stages if s.distill is not None and s.distill.inside]
    own = recipe.model.own_code
    model = (blank if own else probe)(recipe.model, config, allow_code) if inside else None
    if model is None:
        return
    example = data.example(2, TRACED * data.min_length)
    for stage, settings in inside:
        with _in_stage(stage.id, "distill"):
            if own:  # which need not run on random weights
                check_asked(settings, model)
            else:
                check_terms(settings, model, example, pruned=any(one.prune for one in recipe.chain(stage.id)))


def _check_complex(model: nn.Module, example: Batch, signature: Signature) -> None:
    """Of code of a user's own: what it does with complex numbers has a real form. It need not run on random weights."""
    try:
        check_real_form(model, partial(signature.call, model, example))
    except ExportError as error:
        raise ModelError(f"model.modeling: {error}") from None
    except Exception as error:
        log.debug("%s does not run on random weights: %s", type(model).__name__, error)


def check_data(recipe: Recipe, data: Task, processes: int = 1) -> None:
    """What stages, exports and measurements ask of the data."""
    for length in recipe.evaluate.latency.length:
        data.example(1, length)
    for stage in recipe.stages:
        for phase in phases(stage, data.rows(stage), processes):
            for method in stage.methods:
                if method.field in phase.methods:
                    with _in_stage(stage.id, method.field):
                        method_class(method).check_steps(method, phase.steps, phase.steps_per_epoch)
    longest = max(length for split in (data.train, data.test) for length in split.lengths)
    for export in recipe.export:
        with _in_export(export.id):
            signature_with(data.signature(), export.heads, recipe.model.kind)
        limit = export.longest()
        if limit is not None and longest > limit.tokens:
            raise DataError(
                f"export.{export.id}.{limit.field}: {limit.tokens} is less than the longest input, {longest}"
                f" {recipe.model.kind.unit or 'tokens'}; raise it, or lower"
                f" data.max_length (now {recipe.data.max_length})."
            )


def read_questions(
    recipe: Recipe, config: PreTrainedConfig, tokenizer: Any, *, offline: bool = False
) -> list[MultipleChoice]:
    """The tasks of evaluate.multiple_choice, offline those whose rows are here. config: of the model."""
    if not recipe.evaluate.multiple_choice:
        return []
    tasks = read_tasks(recipe.evaluate.multiple_choice, tokenizer, context_length(config, tokenizer), offline=offline)
    for export in recipe.export:
        limit = export.longest()
        for task in tasks:
            if limit is not None and task.longest > limit.tokens:
                raise DataError(
                    f"export.{export.id}.{limit.field}: {limit.tokens} is less than the {task.longest} tokens of the"
                    f" longest question of {task.facts['file']}; raise it, or drop the task from"
                    " evaluate.multiple_choice."
                )
    return tasks


def untrained(recipe: Recipe) -> list[str]:
    """Exported stages whose model no stage has trained: what the recipe starts from must have its head."""
    exported = dict.fromkeys(stage_id for export in recipe.export for stage_id in export.of)
    return [stage_id for stage_id in exported if not any(stage.train for stage in recipe.chain(stage_id))]


def check_head(recipe: Recipe, data: Task, allow_code: bool = False, offline: bool = False) -> None:
    """A model without a trained head that would be exported as it is, at random."""
    stages = untrained(recipe)
    if not stages or not recipe.model.kind.new_head:
        return
    spec = on_this_machine(recipe.model) if offline else recipe.model
    if spec is None or (offline and spec.path != recipe.model.path and not has_weights(spec.path)):
        return
    if not has_trained_head(spec, data.labels, allow_code):
        raise ModelError(
            f"model.path: {recipe.model.path} has no head that is trained"
            f"{f' for the classes {list(data.labels)}' if data.labels else ''}, and nothing trains one for"
            f" {', '.join(stages)}, which {'is' if len(stages) == 1 else 'are'} exported. Give a fine-tuned model, or a"
            " stage with train before."
        )


@contextmanager
def _in_export(export: str) -> Iterator[None]:
    """Errors that begin with a field of the export say in which export it is."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"export.{export}.{error}") from None


@contextmanager
def _in_stage(stage: str, field: str) -> Iterator[None]:
    """Errors that begin with a field of the stage say in which stage it is."""
    try:
        yield
    except UserError as error:
        text = str(error)
        named = text.startswith((f"{field}.", f"{field}:"))
        raise type(error)(f"stages.{stage}.{text}" if named else text) from None
