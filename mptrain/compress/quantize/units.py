"""Which quantizers go together, so that what they quantize can be left in float: by modules and by operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mptrain.compress.quantize.fake_quant import FakeQuantizer
from mptrain.compress.quantize.operations import Readers, watched
from mptrain.compress.quantize.placement import decoded, hooks


@dataclass(frozen=True)
class Unit:
    """What is quantized or left in float together. scopes: modules, or operations (operations.py), that compute with
    what these quantizers round. parts: of a layer, a unit to each of its operations, or to several that share a
    quantizer."""

    quantizers: tuple[FakeQuantizer, ...]
    scopes: tuple[str, ...]
    parts: tuple[Unit, ...] = ()


def units(model: nn.Module, example: Mapping[str, Tensor]) -> list[Unit]:
    """The quantizers of a hooked model, in the order of its modules: those whose values one module computes with, and
    those of modules that share one, are a unit. Operations that run in no module but the model itself, or in one that
    holds all others, are units of their own: no module could be ignored for them alone."""
    record = watched(Readers(model, example), example)
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    moments = {scope: index for index, scope in enumerate(record.scopes.values())}
    readers: list[tuple[FakeQuantizer, set[str]]] = []
    for names, module in hooks(model):
        if isinstance(module, FakeQuantizer):
            found: set[str] = set()
            for kind, operation, _ in map(decoded, names):
                found |= record.computing(operation) if kind == "post_hooks" else {operation}
            readers.append((module, {reader for reader in found if reader in record.scopes}))
    by_module = _grouped(readers, record.modules.__getitem__, order)
    single = _grouped(readers, record.scopes.__getitem__, moments)
    every = {name for unit in by_module for name in unit.scopes} - {""}
    whole = {""} | {name for name in every if len(every) > 1 and all(f"{o}.".startswith(f"{name}.") for o in every)}
    made: list[Unit] = []
    for unit in by_module:
        parts = tuple(_named(part, single, whole) for part in single if part.quantizers[0] in unit.quantizers)
        if whole.isdisjoint(unit.scopes):
            made.append(Unit(unit.quantizers, unit.scopes, parts))
        else:
            made.extend(parts)
    return sorted(made, key=lambda unit: order[unit.scopes[0].partition("/")[0]])


def _named(part: Unit, single: Iterable[Unit], whole: set[str]) -> Unit:
    """By the module where that computes with no other quantizer, and is none of those that hold all."""
    others = {scope.partition("/")[0] for unit in single if unit is not part for scope in unit.scopes} | whole
    modules = [(scope.partition("/")[0], scope) for scope in part.scopes]
    return Unit(part.quantizers, tuple(dict.fromkeys(scope if m in others else m for m, scope in modules)))


def _grouped(
    readers: Iterable[tuple[FakeQuantizer, set[str]]], place: Callable[[str], str], order: Mapping[str, int]
) -> list[Unit]:
    """place: of an operation. order: of places within a unit."""
    groups: list[tuple[set[str], list[FakeQuantizer]]] = []
    for quantizer, operations in readers:
        places = {place(operation) for operation in operations}
        met = [group for group in groups if group[0] & places]
        groups = [group for group in groups if not group[0] & places]
        groups.append((places.union(*(g[0] for g in met)), [q for g in met for q in g[1]] + [quantizer]))
    return [Unit(tuple(q), tuple(sorted(places, key=order.__getitem__))) for places, q in groups if places]
