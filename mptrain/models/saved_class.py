"""The class of a model on disk: found by the names that its config holds, and its code, where it is no transformers'.

A folder names a class of transformers, or holds the code of one: of a modeling file, or of a module of a user's own
(own.py). That code runs only where the caller allows it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import (
    custom_object_save,
    get_class_from_dynamic_module,
    get_relative_import_files,
)

from mptrain.core.disk import Code
from mptrain.core.errors import ModelError
from mptrain.models.own import class_at

CONFIG = "config.json"
CODE = "modeling_mptrain.py"


def base_of(cls: type) -> type | None:
    """The class of transformers that a model is an instance of; None for other code."""
    cls = getattr(cls, "mptrain_base", cls)
    inside = cls.__module__.startswith("transformers.") and getattr(transformers, cls.__name__, None) is cls
    return cls if inside else None


def class_of(folder: Path, config: Mapping[str, Any], ours: Mapping[str, Any], allow_code: bool) -> type:
    """What a model of a folder is built by. config: of the folder. ours: what `mptrain` says in it. allow_code: run the
    code that the folder holds. Raises ModelError."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelError(f"{folder}/{CONFIG}: `architectures` must be one class name, got {names!r}")
    if "code" not in ours:
        cls = getattr(transformers, names[0], None) if names[0].isidentifier() else None
        if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel) or base_of(cls) is None:
            raise ModelError(
                f"{folder}/{CONFIG}: {names[0]!r} is no model class of transformers {transformers.__version__};"
                " install the version that the model was made with"
            )
        return cls
    if not allow_code:
        raise ModelError(
            f"{folder}: the class {names[0]} is not part of transformers, its code is in the folder and would be run."
            " If you trust it, load with allow_code=True (--allow-code on the command line)."
        )
    if ":" in ours["code"]:
        return class_at(folder, ours["code"])
    return get_class_from_dynamic_module(ours["code"], str(folder.absolute()))


def save_code(model: PreTrainedModel, folder: Path) -> str:
    """Put the code of a model that is none of transformers' into a folder; what `class_of` finds it by. Raises
    ModelError."""
    cls = type(model)
    if (keep := getattr(model, "keep_code", None)) is not None:
        return keep(folder)
    if not custom_object_save(model, folder):
        raise ModelError(
            f"the class {cls.__name__} is defined in {cls.__module__}, whose code cannot be saved with the model:"
            " move it to a .py file of its own"
        )
    return f"{Path(inspect.getfile(cls)).stem}.{cls.__name__}"  # the copy has the name of the file, not of the module


def code_of(model: nn.Module, auto: str | None) -> Code | None:
    """The code of a model whose class is not of transformers, to ship with what it is exported to; None for others.

    auto: name of the Auto class that stands for what it does.
    """
    if not isinstance(model, PreTrainedModel) or base_of(type(model)) is not None or hasattr(model, "keep_code"):
        return None
    classes = {"AutoConfig": type(model.config)} | ({auto: type(model)} if auto else {})
    own = {name: cls for name, cls in classes.items() if not cls.__module__.startswith("transformers.")}
    try:
        places = {name: Path(inspect.getfile(cls)) for name, cls in own.items()}
    except (OSError, TypeError):  # made in a session, in no file
        return None
    files = dict.fromkeys(places.values())
    files |= dict.fromkeys(Path(other) for file in list(files) for other in get_relative_import_files(file))
    return Code(tuple(files), {name: f"{places[name].stem}.{cls.__name__}" for name, cls in own.items()})


def auto_classes(model: PreTrainedModel) -> list[str]:
    """Names of the Auto classes that give the model's class for its config."""
    base, found = base_of(type(model)), []
    for name, auto in vars(transformers.models.auto.modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if isinstance(auto, type) and mapping is not None and type(model.config) in mapping:
            classes = mapping[type(model.config)]
            if base in (classes if isinstance(classes, tuple | list) else (classes,)):
                found.append(name)
    return found


def remote_code(base: type, weights: str, quantized: bool) -> str:
    """What CODE holds. weights: the name of their file. quantized: whether they are rounded in any way."""
    text = Path(__file__).with_name(f"{CODE}.txt").read_text(encoding="utf-8")
    values = {"BASE": base.__name__, "WEIGHTS": weights, "QUANTIZED": repr(quantized)}
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text
