"""A model on disk: `save` writes it, `load` reads it back with identical outputs.

config.json             transformers' config plus `mptrain` (format) and `mptrain_structure` (what was cut)
mptrain.safetensors     weights of a pruned or quantized model; a plain one has model.safetensors
compressed.safetensors  weights that are integers or tables (records.py), if any; nothing else holds them
quantizers.json         fake quantizers, if any; their ranges are among the weights
modeling_mptrain.py     for AutoModel….from_pretrained(folder, trust_remote_code=True)

A plain model is an ordinary transformers folder. In the others plain `from_pretrained` finds
no weights, and the error it raises says how to load them: random layers never come out of
it. Nothing is unpickled, and no code of a folder runs unless the caller allows it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from mptrain.compress.adapters.unmerged import MERGE, unmerged
from mptrain.compress.structure import saved
from mptrain.compress.weights import records
from mptrain.core.errors import ModelError, MptrainError, UserError
from mptrain.core.hooks import is_quantized
from mptrain.models import saved_with
from mptrain.models.head import drop_pooler
from mptrain.models.saved_class import CODE, CONFIG, auto_classes, base_of, class_of, remote_code, save_code

VERSION = 1
PLAIN_WEIGHTS = "model.safetensors"
WEIGHTS = "mptrain.safetensors"
COMPRESSED = "compressed.safetensors"
QUANTIZERS = "quantizers.json"
GENERATION = "generation_config.json"

# transformers takes this for a file name and quotes it in the error that it raises
HOW_TO_LOAD = (
    "THIS MODEL WAS PRUNED OR QUANTIZED BY MPTRAIN, load it with mptrain.load(FOLDER)"
    " or with from_pretrained(FOLDER, trust_remote_code=True)"
)


def save(model: nn.Module, folder: str | Path, processor: Any = None) -> None:
    """Write a model, dense or pruned, quantized or not, and its processor to a folder.

    model: one of transformers, or of `mptrain.build`, on any device. folder: where to. processor: a tokenizer, image
    processor or feature extractor, saved beside it. The folder appears whole or not at all; an artifact that is there
    already is replaced.

    - Shapes and dtypes: every tensor as the model has it; those with masters in fp32; tables and integers packed.
    - Units: files take bytes x elements, packed weights bits / 8 to each, and their scales.
    - Source: safetensors in the layout of transformers; what is added stands at the top of this file.
    - Raises UserError when the folder holds something else, ModelError when the model's class
      cannot be saved, it has adapters beside its weights or a compressed weight was changed, MptrainError when writing
      fails.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"only transformers models can be saved, got {type(model).__name__}; unwrap it first, or"
            " make one of your own with mptrain.build"
        )
    if layer := unmerged(model):
        raise ModelError(f"{layer} has adapters of peft, which no model folder holds: {MERGE}, or save them by peft")
    tensors, aliases = unique_tensors(model)
    quantizers = _quantizer_config(model)
    compressed = records.distinct(records.of(model))
    shrunk = saved.of(model) is not None
    special = shrunk or quantizers is not None or bool(compressed)
    config = json.loads(model.config.to_json_string())
    for key in ("transformers_weights", "auto_map") if special else ("transformers_weights",):
        config.pop(key, None)
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    config["mptrain"] = {"version": VERSION, "attn": model.config._attn_implementation}
    with _replaced(Path(folder)) as new:
        base = base_of(type(model))
        if base is None:
            config["mptrain"]["code"] = save_code(model, new)
            config["architectures"] = [type(model).__name__]
        else:
            config["architectures"] = [base.__name__]
        if special:
            config["transformers_weights"] = HOW_TO_LOAD
            if base is not None:
                config["auto_map"] = {auto: f"{Path(CODE).stem}.Shrunk{base.__name__}" for auto in auto_classes(model)}
                (new / CODE).write_text(remote_code(base, WEIGHTS, bool(quantizers or compressed)), encoding="utf-8")
        if quantizers is not None:
            _write_json(new / QUANTIZERS, quantizers)
        if model.can_generate():
            model.generation_config.save_pretrained(new)
        if processor is not None:
            processor.save_pretrained(new)
        _write_json(new / CONFIG, config)
        metadata = {"format": "pt", "aliases": json.dumps(aliases)}
        try:
            if compressed:
                records.write(new / COMPRESSED, compressed)
            plain = {name: tensor for name, tensor in tensors.items() if name not in compressed}
            copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in plain.items()}
            save_file(copies, new / (WEIGHTS if special else PLAIN_WEIGHTS), metadata)
        except SafetensorError as error:
            raise MptrainError(f"{folder}: the weights could not be written ({error}). Check the free space.") from None


def load(folder: str | Path, *, allow_code: bool = False) -> PreTrainedModel:
    """Read a model that `save` wrote, in eval mode on the CPU, with its dtypes and attention implementation.

    allow_code: run the modeling code in the folder, for a class that is not part of
    transformers. folder: what `save` wrote, or a model folder of a run. Global random state is left alone.

    - Shapes and dtypes: those that were saved; pruned layers have the sizes they were cut to.
    - Units: the same bits as were saved, so equal outputs on the same machine.
    - Source: safetensors in the layout of transformers; nothing is unpickled.
    - Raises ModelError when the folder is not whole or not what it says, or needs code.
    """
    folder = Path(folder)
    config = _read_json(folder / CONFIG)
    ours = config.pop("mptrain", None)
    if not isinstance(ours, dict) or ours.get("version") != VERSION:
        found = ours.get("version") if isinstance(ours, dict) else None
        raise ModelError(
            f"{folder}/{CONFIG}: `mptrain.version` must be {VERSION}, got {found!r}. The folder was not written by"
            " this version of mptrain.save; for an ordinary transformers folder use from_pretrained."
        )
    structure = config.pop(saved.KEY, None)
    quantized = (folder / QUANTIZERS).is_file()
    compressed = records.read(folder / COMPRESSED) if (folder / COMPRESSED).is_file() else {}
    special = quantized or structure is not None or bool(compressed)
    if special:
        config.pop("auto_map", None)
    config.pop("transformers_weights", None)
    cls = class_of(folder, config, ours, allow_code)
    try:
        model = _build(cls, config, ours.get("attn"))
    except Exception as error:  # whatever a config made up by hand sets off in transformers
        raise ModelError(f"{folder}/{CONFIG}: a {cls.__name__} cannot be built: {_line(error)}") from None
    with saved_with.said(config):
        _fill(folder, model, special, structure, quantized, compressed)
    if (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_dict(_read_json(folder / GENERATION))
    return model.eval()


def _fill(
    folder: Path,
    model: PreTrainedModel,
    special: bool,
    structure: Any,
    quantized: bool,
    compressed: Mapping[str, records.Record],
) -> None:
    """Structure, quantizers and weights of the folder, into the model that its config makes."""
    weights = folder / (WEIGHTS if special else PLAIN_WEIGHTS)
    if not _has(weights, "pooler."):
        drop_pooler(model)
    if structure is not None:
        saved.apply(model, structure)
    if quantized:
        from mptrain.compress.quantize import quantizers

        description = _read_json(folder / QUANTIZERS)
        try:
            quantizers.attach(model, description)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelError(f"{folder}/{QUANTIZERS} does not fit the model: {_line(error)}") from None
    to_attach = {name: weight.detach() for name, weight in model.named_parameters() if name in compressed}
    _load_tensors(model, _read_tensors(weights, to_attach), folder)
    records.attach(model, compressed)


# -- model


def _build(cls: Any, config: dict[str, Any], attn: Any) -> PreTrainedModel:
    built = cls.config_class.from_dict(config)
    if attn is not None:
        built._attn_implementation = attn
    with torch.random.fork_rng(devices=[]):
        return cls(built)


def _quantizer_config(model: nn.Module) -> dict[str, Any] | None:
    if not is_quantized(model):
        return None
    from mptrain.compress.quantize import quantizers

    return quantizers.config_of(model)


# -- tensors


def unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The model's own tensors under their first names, and the other names of tied ones: {second: first}."""
    first: dict[Any, str] = {}
    tensors, aliases = {}, {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
            tensors[name] = tensor
    return tensors, aliases


def _has(path: Path, prefix: str) -> bool:
    """Whether a file holds a tensor whose name begins so; True for one that cannot be read, which is said later."""
    try:
        with safe_open(path, "pt") as file:
            return any(name.startswith(prefix) for name in file.keys())  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError):
        return True


def _read_tensors(path: Path, left_out: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file and those that it leaves out, under all their names."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
        tensors |= left_out
        return tensors | {second: tensors[name] for second, name in aliases.items()}
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: the model folder is not whole, save it again") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is damaged or truncated ({_line(error)}): save the model again") from None


@torch.no_grad()
def _load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Strictly: every tensor of the model, nothing else, in the dtype of the file."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        saved = tensors.get(name)
        if saved is not None and saved.dtype != value.dtype and saved.is_floating_point() and value.is_floating_point():
            value.data = value.data.to(saved.dtype)
    try:
        model.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        raise ModelError(f"{folder}: the weights do not fit the model of {CONFIG}: {_line(error)}") from None


# -- files


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A new sibling folder that takes the place of `folder` when the block ends well."""
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG).is_file())):
        raise UserError(f"{folder} exists and is not a model folder: give another folder, or empty it first")
    new, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    finally:
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: give the folder of a model that mptrain.save wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({_line(error)}): save the model again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _line(error: Exception) -> str:
    """An error's message as one line of at most 500 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 500 else f"{text[:497]}…"
