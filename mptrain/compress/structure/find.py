"""Finding the blocks of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from mptrain.compress.structure.blocks import Block, Structure
from mptrain.compress.structure.scopes import resolve
from mptrain.compress.structure.version1 import FAMILIES, families_of
from mptrain.core.errors import ModelError
from mptrain.core.hooks import HOOKS

BY_HAND: dict[str, Callable[[nn.Module], Iterable[Block]]] = {}
"""by the name of a model's class, who gives its blocks (`mptrain.extend.register_structure`)"""


def find_structure(
    model: nn.Module, example: Mapping[str, Tensor] | None = None, *, ignore: Sequence[str] = ()
) -> Structure:
    """The blocks of a model, dense or already shrunk.

    example: inputs of the model. ignore: patterns of `scopes.resolve`; blocks with a parameter in a module that one
    of them matches are marked not prunable.
    Raises ModelError when nothing can be cut, UserError for an entry of `ignore` that matches no module.
    """
    ignored = _resolve(ignore, [name for name, _ in model.named_modules() if name and HOOKS not in name])
    given = BY_HAND.get(type(model).__name__)
    name, blocks = families_of(model) if given is None else (type(model).__name__, list(given(model)))
    if not blocks:
        raise ModelError(
            f"{type(model).__name__} has no attention layers that can be pruned. Supported families are"
            f" {', '.join(FAMILIES)}; use a model of one of these, or drop `prune` from the recipe."
        )
    return Structure(name, tuple(replace(block, prunable=_free(block, ignored)) for block in blocks))


def _resolve(ignore: Sequence[str], names: Iterable[str]) -> set[str]:
    return resolve(ignore, names, "prune.ignore") if ignore else set()


def _free(block: Block, ignored: set[str]) -> bool:
    return ignored.isdisjoint(axis.parameter.rpartition(".")[0] for axis in block.axes if axis.role != "side")
