"""Blocks that are written down: where dataflow does not show the units, or shows more than is meant.

    block(model, "heads", 8, sources=["attn.q", "attn.k", "attn.v"], sinks=["attn.o"], edits={"attn.num_heads": 1})
    block(model, "ffn", 256, sources=["mlp.up", "mlp.gate"], sinks=["mlp.down"])

A place is the name of a Linear, Conv1D or convolution, whose outputs (a source) or inputs (a sink) are split evenly
over the units in their order, its bias along; or (parameter, dim), split alike; or (parameter, dim, indices).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from mptrain.compress.structure import fields
from mptrain.compress.structure.blocks import Axis, Block, Edit, Kind, Role
from mptrain.compress.structure.naming import layer_of, name_of
from mptrain.core.errors import ModelError

Place = str | tuple[str, int] | tuple[str, int, Sequence[Sequence[int]]]


def block(
    model: nn.Module,
    kind: Kind,
    units: int,
    *,
    sources: Iterable[Place],
    sinks: Iterable[Place],
    sides: Iterable[Place] = (),
    edits: Mapping[str, int] | None = None,
    heads: int | None = None,
    cores: Iterable[str] = (),
    layer: str | None = None,
) -> Block:
    """A block of `model`, dense or already shrunk.

    edits: by "module.attribute", an integer that counts units, with how much of it a unit is. heads: query heads to a
    unit, 1 for kind "heads". cores: modules in which attention happens, for its multiply-adds. layer: of reports.
    Raises ModelError for a place that does not exist or does not divide by the units.
    """
    axes: list[Axis] = []
    given: list[tuple[Role, Iterable[Place]]] = [("source", sources), ("sink", sinks), ("side", sides)]
    for role, places in given:
        for place in places:
            axes += _axes(model, role, place, units)
    own = [
        Edit(module, attribute, per_unit)
        for path, per_unit in (edits or {}).items()
        for module, _, attribute in [path.rpartition(".")]
    ]
    for edit in own:
        if type(getattr(model.get_submodule(edit.module), edit.attribute, None)) is not int:
            raise ModelError(f"edits: {edit.module}.{edit.attribute} is no integer attribute of the model")
    owners = [axis.parameter.rpartition(".")[0] for axis in axes if axis.role != "side"]
    layer = layer_of(model, owners) if layer is None else layer
    return Block(
        name=name_of(model, owners, kind),
        kind=kind,
        units=units,
        axes=tuple(axes),
        layer=layer,
        edits=(*fields.edits_of(model, axes), *own),
        heads=(1 if heads is None else heads) if kind == "heads" else 0,
        fixed_params=fixed_params(model, axes),
        cores=tuple(cores),
    )


def fixed_params(model: nn.Module, axes: Iterable[Axis]) -> int:
    """Parameters of the sinks' modules that no axis cuts: their biases."""
    axes = list(axes)
    cut = {axis.parameter for axis in axes}
    owners = dict.fromkeys(axis.parameter.rpartition(".")[0] for axis in axes if axis.role == "sink")
    return sum(
        parameter.numel()
        for owner in owners
        for name, parameter in model.get_submodule(owner).named_parameters(prefix=owner, recurse=False)
        if name not in cut
    )


def _axes(model: nn.Module, role: Role, place: Place, units: int) -> list[Axis]:
    if not isinstance(place, str):
        return [_axis(model, role, place[0], place[1], units, place[2] if len(place) == 3 else None)]
    try:
        module = model.get_submodule(place)
    except AttributeError:
        raise ModelError(f"{role}: the model has no module {place!r}") from None
    dim = fields.output_dim(module) if role == "source" else fields.input_dim(module)
    if dim is None or role == "side":
        raise ModelError(
            f"{role}: {place} is a {type(module).__name__}, not a Linear, Conv1D or convolution; give"
            " (parameter, dimension) instead"
        )
    found = [_axis(model, role, f"{place}.weight", dim, units)]
    if role == "source" and getattr(module, "bias", None) is not None:
        found.append(_axis(model, "side", f"{place}.bias", 0, units))
    return found


def _axis(model: nn.Module, role: Role, name: str, dim: int, units: int, indices: Any = None) -> Axis:
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    if name not in tensors or not 0 <= dim < tensors[name].dim():
        raise ModelError(f"{role}: the model has no parameter {name!r} with a dimension {dim}")
    tensor = tensors[name]
    size = tensor.shape[dim]
    if indices is None:
        if size % units:
            raise ModelError(f"{role}: dimension {dim} of {name} has {size} entries, which {units} units do not divide")
        indices = np.arange(size).reshape(units, -1)
    table = np.asarray(indices, dtype=np.int64)
    if table.ndim != 2 or len(table) != units or table.min() < 0 or table.max() >= size:
        raise ModelError(f"{role}: indices of {name} must be [{units}, n] numbers below {size}")
    return Axis(name, dim, table, role, size, tensor.numel() // size)
