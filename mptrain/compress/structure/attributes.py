"""Tensors and integer attributes of a model by name: read, written and replaced in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mptrain.core.errors import ModelError

CONFIG = "config."


class OwnConfig:
    """A config in which one module has values of its own; all else is read from the config that it shares."""

    def __init__(self, shared: Any) -> None:
        self.__dict__["_shared"] = shared

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_shared" not in self.__dict__:  # copy and pickle ask before there is a state
            raise AttributeError(name)
        return getattr(self.__dict__["_shared"], name)


def tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer. Raises ModelError where there is none of that name."""
    owner, _, last = name.rpartition(".")
    try:
        found = getattr(model.get_submodule(owner), last)
    except AttributeError:
        found = None
    if not isinstance(found, Tensor):
        raise ModelError(f"{type(model).__name__} has no parameter {name!r}")
    return found


def replace(model: nn.Module, new: Mapping[int, Tensor]) -> None:
    """Put new values in the place of parameters and buffers, by id of the old, in every module that has them."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, old in _own(module):
            if id(old) in new:
                values = new[id(old)].contiguous()
                if isinstance(old, nn.Parameter):
                    values = nn.Parameter(values, old.requires_grad)
                setattr(module, name, made.setdefault(id(old), values))


def read(module: nn.Module, attribute: str, item: int | None = None) -> Any:
    """An attribute, or one of its config's after "config."; `item` of a list or tuple."""
    owner: Any = module
    if attribute.startswith(CONFIG):
        owner, attribute = module.config, attribute.removeprefix(CONFIG)
    value = getattr(owner, attribute)
    return value if item is None else value[item]


def write(module: nn.Module, attribute: str, item: int | None, value: Any) -> None:
    if item is not None:
        whole = list(old := read(module, attribute))
        whole[item] = value
        value = type(old)(whole) if type(old) in (list, tuple) else tuple(whole)
    if not attribute.startswith(CONFIG):
        setattr(module, attribute, value)
        return
    if not isinstance(module.config, OwnConfig):
        module.config = OwnConfig(module.config)  # type: ignore[assignment]
    module.config.__dict__[attribute.removeprefix(CONFIG)] = value


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers of one module, under all their names."""
    parameters = module.named_parameters(recurse=False, remove_duplicate=False)
    return [*parameters, *module.named_buffers(recurse=False, remove_duplicate=False)]
