"""From the recipe's `model:` to a float32 transformers model.

Loading is strict and repeatable: a checkpoint that lacks a part of the encoder is an error, and a new head is drawn
from the recipe's seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from mptrain.core.errors import ModelError
from mptrain.core.hooks import is_quantized
from mptrain.models import own
from mptrain.models.folder import LOADING, check_weights, config_json, is_artifact, locate, quiet, unloadable
from mptrain.models.head import drop_pooler, fit_head, head_class
from mptrain.models.processor import image_size, load_processor
from mptrain.recipe import Checkpoint, Model


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
    path, options = locate(spec, allow_code)
    if spec.module is not None:  # whether its head is trained, only its code knows
        return _load_own(spec, path, labels, seed), True
    folder = Path(path) if options["local_files_only"] else None
    if folder and is_artifact(folder):
        return _load_artifact(spec, folder, labels, allow_code, new_head), True
    if folder:
        check_weights(folder)
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            cls = head_class(spec.kind) if spec.modeling is None else _model_class(Path(spec.modeling), path)
            config = _config(spec, path, options)
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
    except LOADING as error:
        raise unloadable(spec, "model", error) from error
    # Else save_pretrained renames weights back to what the checkpoint called them (LayerNorm.gamma).
    model._weight_conversions = []
    return model.eval(), trained


def _load_own(spec: Model, path: str, labels: Sequence[str] | None, seed: int) -> PreTrainedModel:
    cls = _own_class(spec, path, allow_code=True)
    config = own.config_of(spec, image_size(spec))
    if labels is not None:
        config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config).float().eval()
    own.check(model, labels)
    return model


def _own_class(spec: Checkpoint, path: str, allow_code: bool) -> Any:
    """Of `module`, or of a folder that such a model was saved to; None for others. Raises ModelError."""
    if spec.module is not None:
        file, _, function = spec.module.rpartition(":")
        return own.class_of(modeling_file(Path(file), path, "model.module"), function)
    return own.class_in(Path(path), allow_code)


def read_config(spec: Checkpoint, allow_code: bool = False) -> PreTrainedConfig:
    """The model's config alone. Raises ModelError."""
    path, options = locate(spec, allow_code)
    try:
        with quiet():
            return _config_at(spec, path, options, allow_code)
    except LOADING as error:
        raise unloadable(spec, "config", error) from error


def _config_at(spec: Checkpoint, path: str, options: dict[str, Any], allow_code: bool = False) -> PreTrainedConfig:
    """Of the kind that `modeling` has, which transformers need not know; else of the kind that the file names."""
    if isinstance(spec, Model) and spec.module is not None:
        return own.config_of(spec, image_size(spec))
    if own.class_in(Path(path), allow_code) is not None:
        return own.OwnConfig.from_dict(config_json(Path(path)))
    if spec.modeling is None:
        return AutoConfig.from_pretrained(path, **options)
    cls: Any = _model_class(Path(spec.modeling), path)
    return cls.config_class.from_pretrained(path, local_files_only=options["local_files_only"])


def skeleton(spec: Model, config: PreTrainedConfig, allow_code: bool = False) -> PreTrainedModel:
    """The model without weights, on torch's meta device. Raises ModelError where the task has no such model.

    config: as `read_config` gives it. `spec.modeling` and `spec.module` build by their own, and raise whatever their
    code raises.
    """
    if isinstance(config, own.OwnConfig):
        cls = _own_class(spec, locate(spec, allow_code)[0], allow_code)
        with torch.device("meta"):
            return cls(config)
    if spec.modeling is not None:
        path, options = locate(spec, allow_code)
        cls = _model_class(Path(spec.modeling), path)
        built = _config(spec, path, options)
        with torch.device("meta"):
            return cls(built)
    try:
        with torch.device("meta"):
            code = spec.trust_remote_code and allow_code
            model = head_class(spec.kind).from_config(config, trust_remote_code=code)
            if spec.kind.bare:
                drop_pooler(model)
            return model
    except LOADING as error:
        raise unloadable(spec, "model", error) from error


def _attention(spec: Checkpoint) -> str | None:
    """What the recipe says; if it says nothing, sdpa where the architecture has it (Swin has not)."""
    return spec.attn if "attn" in spec.model_fields_set else None


def _config(spec: Model, path: str, options: dict[str, Any]) -> PreTrainedConfig:
    config = _config_at(spec, path, options)
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


def modeling_file(file: Path, folder: str | Path, field: str = "model.modeling") -> Path:
    """Here, or in the model's folder. Raises ModelError."""
    file, inside = file.expanduser(), Path(folder) / file
    if not file.is_file() and not inside.is_file():
        raise ModelError(f"{field}: there is no file {file.absolute()}, nor {inside}.")
    return file if file.is_file() else inside


def _model_class(file: Path, path: str) -> type[PreTrainedModel]:
    """The model class in a local .py file, or one in the model's folder: the one config.json names in architectures,
    else the only one."""
    file = modeling_file(file, path)
    name = f"mptrain_modeling_{file.stem}"
    module = own.run_file(file, name, "model.modeling")
    classes = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, PreTrainedModel) and value.__module__ == name
    }
    named = config_json(Path(path)).get("architectures") or [] if Path(path).is_dir() else []
    chosen = [classes[key] for key in named if key in classes] or list(classes.values())
    if len(chosen) != 1:
        raise ModelError(
            f"model.modeling: {file.absolute()} defines {len(chosen)} model classes ({', '.join(classes) or 'none'});"
            " define one subclass of PreTrainedModel, or name one in `architectures` of config.json."
        )
    return chosen[0]
