"""What a shrunk model is, in config.json (`mptrain_structure`), so that it is built again without looking for blocks.

    {"version": 2,
     "blocks": {"bert.encoder.layer.0.attention": {"kind": "heads", "units": 3, "of": 12}, …},      for people
     "tensors": {"bert.encoder.layer.0.attention.self.query.weight": [96, 384], …},
     "attributes": {"bert.encoder.layer.0.attention.self": {"num_attention_heads": 3, "all_head_size": 96}, …}}

`tensors` has the shape of each parameter and buffer that is smaller than the config builds it, `attributes` the
integers of modules that count units. Where modules stand in the places of others (stand_ins.py) the version is 3, and

     "modules": {"bert.embeddings.word_embeddings": {"kind": "low_rank", "size": 128},
                 "bert.encoder.layer.0.attention.self.query": {"kind": "zeros", "size": 32},
                 "bert.encoder.layer.0.attention.output.dense": {"kind": "constant", "size": 384}, …}

has them: of blocks that are left out whole (`units` 0), and of an embedding that is a product. Version 1 named the
units of each layer of a known family: version1.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mptrain.compress.structure import attributes, stand_ins, version1
from mptrain.compress.structure.blocks import Edit, Kept, Structure, short
from mptrain.core.errors import ModelError

VERSION, WITH_MODULES = 2, 3
KEY = "mptrain_structure"
WHERE = f"config.json: {KEY}"
_NOTHING: dict[str, Any] = {"blocks": {}, "tensors": {}, "attributes": {}}


def of(model: nn.Module) -> dict[str, Any] | None:
    """The description of a shrunk model, None of a dense one."""
    return getattr(_holder(model), KEY, None)


def blocks(model: nn.Module) -> dict[str, Any]:
    """What is said of the blocks of a shrunk model, by their names; nothing of a dense one."""
    return (of(model) or _NOTHING)["blocks"]


def remember(model: nn.Module, structure: Structure, kept: Kept, names: Iterable[str], edits: Iterable[Edit]) -> None:
    """Describe a model after a cut of the tensors `names` and `edits`; what an earlier cut changed stays named, unless
    a constant stands there now."""
    before = of(model) or _NOTHING
    modules = stand_ins.described(model)
    blocks: dict[str, Any] = {name: one for name, one in before["blocks"].items() if not one["units"]}
    blocks |= {
        block.name: {
            "kind": block.kind,
            "units": kept.count(block),
            "of": before["blocks"].get(block.name, {}).get("of", block.units),
        }
        for block in structure
    }
    tensors = {
        name: list(attributes.tensor(model, name).shape)
        for name in {**before["tensors"], **dict.fromkeys(names)}
        if name.rpartition(".")[0] not in modules
    }
    changed = {(module, name): None for module, names in before["attributes"].items() for name in names}
    changed |= {(edit.module, edit.attribute): None for edit in edits}
    found: dict[str, dict[str, Any]] = {}
    for module, name in changed:
        if module in modules:
            continue
        value = attributes.read(model.get_submodule(module), name)
        found.setdefault(module, {})[name] = value if isinstance(value, int) else list(value)
    description = {"version": VERSION, "blocks": blocks, "tensors": tensors, "attributes": found}
    if modules:
        description |= {"version": WITH_MODULES, "modules": modules}
    setattr(_holder(model), KEY, description)


def remember_modules(model: nn.Module) -> None:
    """Describe a model in which a module was put in the place of another, and nothing else was changed."""
    description = {**(of(model) or _NOTHING), "version": WITH_MODULES, "modules": stand_ins.described(model)}
    setattr(_holder(model), KEY, description)


@torch.no_grad()
def apply(model: nn.Module, data: Any) -> None:
    """Bring a model as its config builds it to the shapes and attributes of `data`; values are to be loaded then.

    Raises ModelError for anything that is not a description of this model.
    """
    if isinstance(data, Mapping) and data.get("version") == 1:
        data = version1.upgraded(model, data)
    if not isinstance(data, Mapping) or data.get("version") not in (VERSION, WITH_MODULES):
        found = data.get("version") if isinstance(data, Mapping) else type(data).__name__
        raise ModelError(
            f"{WHERE} must be an object of version {VERSION} or {WITH_MODULES}, got {found!r}; load it with a newer"
            " mptrain"
        )
    also = ("modules",) if data["version"] == WITH_MODULES else ()
    for key in ("blocks", "tensors", "attributes", *also):
        if not isinstance(data.get(key), Mapping):
            raise ModelError(f"{WHERE}.{key} must be an object, got {short(data.get(key))}")
    for name, one in data["blocks"].items():
        if not isinstance(one, Mapping) or type(one.get("units")) is not int or not isinstance(one.get("kind"), str):
            raise ModelError(f"{WHERE}.blocks.{name} must be an object with kind and units, got {short(one)}")
    for key in also:
        _replace(model, data[key])
    for name, shape in data["tensors"].items():
        try:
            old = attributes.tensor(model, name)
        except ModelError as error:
            raise ModelError(f"{WHERE}.tensors: {error}") from None
        fits = isinstance(shape, list) and len(shape) == old.dim() and all(type(n) is int for n in shape)
        if not fits or not all(1 <= n <= size for n, size in zip(shape, old.shape)):
            raise ModelError(f"{WHERE}.tensors.{name} must be a part of {list(old.shape)}, got {short(shape)}")
        attributes.replace(model, {id(old): old.detach()[tuple(slice(n) for n in shape)].clone()})
    for path, values in data["attributes"].items():
        _set(model, path, values)
    setattr(_holder(model), KEY, dict(data))


def _replace(model: nn.Module, modules: Mapping[str, Any]) -> None:
    """Stand-ins take the places of modules that they fit: nothing else can be put there."""
    for name, one in modules.items():
        try:
            model.set_submodule(name, stand_ins.build(model.get_submodule(name), **one))
        except (AttributeError, TypeError, ValueError) as error:
            raise ModelError(f"{WHERE}.modules.{name} does not fit {type(model).__name__}: {error}") from None


def _set(model: nn.Module, path: str, values: Any) -> None:
    """Integers take the place of integers, and of lists of as many of them: nothing else can be set."""
    where = f"{WHERE}.attributes.{path}"
    try:
        module = model.get_submodule(path)
        old = {name: attributes.read(module, name) for name in values}
    except (AttributeError, TypeError) as error:
        raise ModelError(f"{where} does not fit {type(model).__name__}: {error}") from None
    for name, value in values.items():
        several = isinstance(old[name], (list, tuple))
        was, new = list(old[name]) if several else [old[name]], value if several else [value]
        if not all(type(n) is int for n in was):
            raise ModelError(f"{where}.{name} is no whole number in {type(model).__name__}, so it cannot be set")
        fits = isinstance(new, list) and len(new) == len(was) and all(type(n) is int for n in new)
        if not fits or not all(0 <= n <= most for n, most in zip(new, was)):
            raise ModelError(f"{where}.{name} must be at most {short(old[name])}, got {short(value)}")
        for item, n in enumerate(new):
            attributes.write(module, name, item if several else None, n)


def _holder(model: nn.Module) -> Any:
    """A transformers model keeps its description with its config, any other module by itself."""
    config = getattr(model, "config", None)
    return model if config is None else config
