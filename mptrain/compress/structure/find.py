"""Finding the blocks of a model: those a user wrote down for its class, else those that dataflow shows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from mptrain.compress.structure import dropped, fingerprint
from mptrain.compress.structure.blocks import Block, Refusal, Structure
from mptrain.compress.structure.dataflow import finder
from mptrain.compress.structure.scopes import resolve
from mptrain.core.errors import ModelError
from mptrain.core.hooks import HOOKS

BY_HAND: dict[str, Callable[[nn.Module], Iterable[Block]]] = {}
"""by the name of a model's class, who gives its blocks (`mptrain.extend.register_structure`)"""

_found: dict[Hashable, tuple[list[Block], list[Refusal]]] = {}
_MOST = 32  # architectures that a process remembers


def find_structure(
    model: nn.Module, example: Mapping[str, Tensor] | None = None, *, ignore: Sequence[str] = ()
) -> Structure:
    """The blocks of a model, dense or already shrunk, with or without weights, on any device.

    example: keyword arguments of a forward pass; for models of transformers they can be made up. ignore: patterns of
    `scopes.resolve`; blocks with a parameter in a module that one of them matches are marked not prunable.
    Raises ModelError when nothing can be cut or the model does not run on the example, UserError for an entry of
    `ignore` that matches no module.
    """
    ignored = _resolve(ignore, [name for name, _ in model.named_modules() if name and HOOKS not in name])
    given = BY_HAND.get(type(model).__name__)
    blocks, refused = _by_dataflow(model, example) if given is None else (list(given(model)), [])
    if not blocks:
        reasons = "".join(f"\n  {one.what}: {one.reason}" for one in refused[:8])
        raise ModelError(
            f"nothing can be cut out of {type(model).__name__}: no heads, FFN channels or channels between convolutions"
            f" that are made in one place and read in another. Write its blocks down (docs/extend.md), or drop `prune`"
            f" from the recipe.{reasons}"
        )
    name = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    free = tuple(replace(block, prunable=_free(block, ignored)) for block in blocks)
    return Structure(name if given is None else type(model).__name__, free, tuple(refused))


def droppable(
    model: nn.Module, structure: Structure, example: Mapping[str, Tensor] | None = None
) -> tuple[list[str], list[Refusal]]:
    """Names of the blocks of `structure` that may be left out whole, proved, and of the other prunable ones why not.

    model, example: of `find_structure`.
    """
    blocks, refused = [], []
    for block in structure.prunable():
        if reason := dropped.why_not(model, block):
            refused.append(Refusal(block.name, reason))
        else:
            blocks.append(block)
    faults = finder.faults_without(model, blocks, example) if blocks else {}
    refused += [Refusal(name, fault) for name, fault in faults.items()]
    return [block.name for block in blocks if block.name not in faults], refused


def _by_dataflow(model: nn.Module, example: Mapping[str, Tensor] | None) -> tuple[list[Block], list[Refusal]]:
    """What was found before for the same architecture is not looked for again."""
    key = fingerprint.of(model)
    if key is None:
        return finder.find(model, example)
    if key not in _found:
        while len(_found) >= _MOST:
            del _found[next(iter(_found))]
        _found[key] = finder.find(model, example)
    return _found[key]


def _resolve(ignore: Sequence[str], names: Iterable[str]) -> set[str]:
    return resolve(ignore, names, "prune.ignore") if ignore else set()


def _free(block: Block, ignored: set[str]) -> bool:
    return ignored.isdisjoint(axis.parameter.rpartition(".")[0] for axis in block.axes if axis.role != "side")
