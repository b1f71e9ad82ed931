"""What a run begins with: the model without its weights, its processor, the data, the questions.

A dry run downloads nothing: what is not on this machine is None there, and the sizes are those of `planning`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from mptrain.core.errors import ModelError, UserError
from mptrain.data.lm_eval.questions import MultipleChoice
from mptrain.data.load import Task, load_data
from mptrain.data.sources import packaged
from mptrain.data.sources.places import is_there
from mptrain.data.sources.splits import SPLITS
from mptrain.data.sources.tables import read_table
from mptrain.models.folder import HUB_NAME
from mptrain.models.load import read_config, skeleton
from mptrain.models.processor import load_processor
from mptrain.recipe import Model, Planning, Recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Architecture:
    """model: without weights, on the meta device; None where its own code does not work so. known: whether config
    and model are those of model.path. said: where they are from, for a reader.
    """

    config: PreTrainedConfig
    model: PreTrainedModel | None
    known: bool
    said: str


@dataclass(frozen=True)
class Inputs:
    """All that a run reads, checked by `preflight.check`. In a dry run processor and data are None, and questions may
    lack some, where they are not on this machine; a run has them all.
    """

    architecture: Architecture
    processor: Any
    data: Task | None
    questions: list[MultipleChoice]


def read_architecture(recipe: Recipe, *, allow_code: bool = False, offline: bool = False) -> Architecture:
    """Raises ModelError; UserError for a `planning` that no model has."""
    spec = recipe.model
    if not offline or not _on_hub(spec):
        if spec.path.startswith(packaged.PREFIX) and offline and packaged.cached(spec.path) is None:
            return _planned(recipe)
        config = read_config(spec, allow_code)
        return Architecture(config, _skeleton(spec, config, allow_code), True, "its config is here")
    try:
        config = AutoConfig.from_pretrained(spec.path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return _planned(recipe)
    if spec.modeling is not None:  # what it builds of this config only its code says
        return Architecture(config, skeleton(_plain(spec), config), False, "the config is cached by the hub client")
    return Architecture(config, skeleton(spec, config), True, "cached by the hub client")


def read_processor(spec: Model, *, allow_code: bool = False, offline: bool = False) -> Any:
    """The model's tokenizer, image processor or feature extractor; None where it is not here."""
    here = on_this_machine(spec) if offline else spec
    return None if here is None else load_processor(here, allow_code)


def read_data(recipe: Recipe, processor: Any, *, allow_code: bool = False, offline: bool = False) -> Task | None:
    """None where it is not here. Raises DataError, for a file that is missing also without the processor."""
    source = recipe.data.source
    if offline and source is not None:
        here = packaged.cached(source) is not None if source.startswith(packaged.PREFIX) else _exists(source)
        if not here:
            return None
    if offline and processor is None:
        for name in SPLITS if source is None else ():
            file = getattr(recipe.data, name)
            if file is not None and not is_there(file):
                read_table(file, f"data.{name}")  # raises
        return None
    return load_data(recipe.data, recipe.model.task, processor, seed=recipe.seed, allow_code=allow_code)


def on_this_machine(spec: Model) -> Model | None:
    """The model as a folder or package that is here; None where it would have to be downloaded."""
    if spec.path.startswith(packaged.PREFIX):
        return spec if packaged.cached(spec.path) is not None else None
    if not _on_hub(spec):
        return spec
    try:
        return spec.model_copy(update={"path": snapshot_download(spec.path, local_files_only=True)})
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _on_hub(spec: Model) -> bool:
    """Whether the path is a name of the hub, and no folder has it."""
    if spec.path.startswith(packaged.PREFIX):
        return False
    return not _exists(spec.path) and HUB_NAME.fullmatch(spec.path) is not None


def _exists(path: str) -> bool:
    return Path(path).expanduser().exists()


def _plain(spec: Model) -> Model:
    return spec.model_copy(update={"modeling": None, "module": None})


def _skeleton(spec: Model, config: PreTrainedConfig, allow_code: bool) -> PreTrainedModel | None:
    try:
        return skeleton(spec, config, allow_code)
    except ModelError:
        raise
    except Exception as error:  # code of a user's own need not work on tensors without values
        log.warning(
            "model.%s: what the stages ask of its model is not checked before training, for it cannot be built"
            " without weights: %s", "modeling" if spec.module is None else "module", error,
        )  # fmt: skip
        return None


def _planned(recipe: Recipe) -> Architecture:
    config = _config_of(recipe.planning)
    if recipe.model.kind.head is None:  # code of a user's own, which is not here; only its size is assumed
        with torch.device("meta"):
            return Architecture(
                config, AutoModel.from_config(config), False, "not on this machine; sizes from planning"
            )
    model = skeleton(_plain(recipe.model), config)
    return Architecture(config, model, False, "not on this machine; sizes from planning")


def _config_of(planning: Planning) -> PreTrainedConfig:
    try:
        return AutoConfig.for_model(planning.model_type, **planning.config)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"planning.model_type: transformers makes no config of {planning.model_type!r} with {planning.config}"
            f" ({str(error).splitlines()[0]}); give the model_type of a transformers config, e.g. bert."
        ) from None
