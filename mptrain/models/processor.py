"""The tokenizer, image processor or feature extractor that comes with a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import transformers
from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer
from transformers.image_processing_utils import BaseImageProcessor

from mptrain.core.errors import ModelError, MptrainError
from mptrain.models.folder import locate, quiet, unloadable
from mptrain.models.head import head_class
from mptrain.models.own import INPUTS
from mptrain.recipe import Model


def load_processor(spec: Model, allow_code: bool = False) -> Any:
    """The tokenizer, image processor or feature extractor of the model. Raises ModelError."""
    path, options = locate(spec, allow_code)
    if spec.kind.processor is None:
        return None
    if spec.module is not None and not spec.path:
        return _given(spec)
    try:
        with quiet():
            return PROCESSORS[spec.kind.processor](spec, path, options)
    except MptrainError:
        raise
    except Exception as error:  # the tokenizers library raises no kind of its own
        raise unloadable(spec, "processor (tokenizer, image processor or feature extractor)", error) from error


def image_size(spec: Model) -> tuple[int, int] | None:
    """Height and width of every picture; None where its processor leaves them open, or makes no pictures."""
    if spec.kind.processor != "image":
        return None
    size = load_processor(spec, allow_code=True).size
    height, width = (dict(size).get(side) for side in ("height", "width"))
    return (height, width) if height and width else None


def _given(spec: Model) -> Any:
    """Of a module of one's own, that comes without a folder."""
    if spec.kind.processor != "image":
        raise ModelError(
            f"model.path: task {spec.task} needs a {spec.kind.processor or 'processor'}, and model.module gives none:"
            " set path to a folder, packaged or hub model that has one."
        )
    if spec.picture is None:
        raise ModelError(
            "model.picture: how pictures are given to model.module is not said: set picture: {size: 32}, or path to a"
            " folder with a preprocessor_config.json."
        )
    size, three = spec.picture.size, lambda value: value if isinstance(value, list) else [value] * 3
    height, width = size if isinstance(size, list) else (size, size)
    return transformers.ViTImageProcessorPil(
        size={"height": height, "width": width}, image_mean=three(spec.picture.mean), image_std=three(spec.picture.std)
    )


def _tokenizer(spec: Model, path: str, options: dict[str, Any]) -> Any:
    # Byte-level tokenizers refuse words that are already split unless told that a space comes before them.
    prefix = {"add_prefix_space": True} if spec.kind.words else {}
    tokenizer = AutoTokenizer.from_pretrained(path, **prefix, **options)
    tokenizer.model_input_names = _accepted(spec, path, options, tokenizer.model_input_names)
    pieces = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if not any(piece.strip("▁Ġ") for piece in pieces):
        # transformers makes an empty tokenizer when it finds no files; some have the piece of a space even so.
        raise ModelError(
            f"model.path: {spec.path} has no tokenizer; copy the tokenizer's files (tokenizer.json) there."
        )
    if spec.kind.offsets and not tokenizer.is_fast:
        raise ModelError(
            f"model.path: {spec.path} has no fast tokenizer ({type(tokenizer).__name__}), and task {spec.task} has to"
            " know which characters a token stands for, which others do not say. Save one with AutoTokenizer,"
            " use_fast=True, or choose another model."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ModelError(f"model.path: the tokenizer of {spec.path} has no pad, eos or unk token to pad with; set one.")
    return tokenizer


def _accepted(spec: Model, path: str, options: dict[str, Any], names: list[str]) -> list[str]:
    """The inputs that the model takes: a tokenizer of a general class makes token_type_ids for every model."""
    if spec.module is not None:
        return [name for name in names if name in INPUTS["tokenizer"]]
    if spec.modeling is not None:
        return names
    cls = head_class(spec.kind)._model_mapping.get(type(AutoConfig.from_pretrained(path, **options)), None)
    forward = getattr(cls, "forward", None)
    if forward is None:
        return names
    return [name for name in names if name in inspect.signature(forward).parameters]


def _image_processor(path: str, options: dict[str, Any]) -> Any:
    """The Pillow variant, so that pixels are the same with and without torchvision."""
    config, _ = BaseImageProcessor.get_image_processor_dict(path, local_files_only=options["local_files_only"])
    kind = config.get("image_processor_type") or config.get("feature_extractor_type", "")
    name = kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil") + "Pil"
    cls = getattr(transformers, name, None)
    if cls is None:
        raise ValueError(f"its image processor {kind!r} has no Pillow variant in transformers")
    return cls.from_pretrained(path, local_files_only=options["local_files_only"])


PROCESSORS: dict[str, Callable[[Model, str, dict[str, Any]], Any]] = {
    "tokenizer": _tokenizer,
    "image": lambda spec, path, options: _image_processor(path, options),
    "audio": lambda spec, path, options: AutoFeatureExtractor.from_pretrained(path, **options),
}
