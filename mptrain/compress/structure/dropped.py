"""Blocks of which no unit is left: what their layers then compute is a constant, and takes their place.

    sources   Zeros(n): [..., n], as wide as one unit, without parameters
    sinks     Constant(bias): [..., outputs], the bias, in which is what the block gave on average (prune/curvature.py)

What lies between, attention itself, an activation, a key-value cache, runs as the code of the model has it, on one unit
of zeros: indices of caches, shapes and attributes stay what that code expects. Nothing reads what it computes, so
exporters leave it out of their graphs.

Which blocks can go so is proved like all that is cut (dataflow/proof.py), by `find.droppable`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.compress.structure import fields
from mptrain.compress.structure.blocks import Axis, Block, Kept
from mptrain.core.errors import ModelError


class Zeros(nn.Module):
    """In the place of a layer that makes units. x: [..., inputs]; gives [..., size] of the same dtype."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    @classmethod
    def in_place_of(cls, module: nn.Module, size: int) -> Zeros:
        outputs = _outputs(module)
        if outputs is None or not 1 <= size <= outputs:
            raise ValueError(f"zeros of {size} cannot stand in the place of {type(module).__name__} of {outputs}")
        return cls(size)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros((*x.shape[:-1], self.size))

    def extra_repr(self) -> str:
        return str(self.size)


class Constant(nn.Module):
    """In the place of a layer that reads units. x: [..., anything]; gives `bias` [outputs] in every place of it."""

    def __init__(self, bias: nn.Parameter) -> None:
        super().__init__()
        self.bias = bias

    @property
    def size(self) -> int:
        return len(self.bias)

    @classmethod
    def in_place_of(cls, module: nn.Module, size: int) -> Constant:
        outputs = _outputs(module)
        if outputs is None or size != outputs:
            raise ValueError(f"a constant of {size} cannot stand in the place of {type(module).__name__} of {outputs}")
        return cls(nn.Parameter(_bias(module)))

    def forward(self, x: Tensor) -> Tensor:
        # memory of its own, which a model may write to, as it may to what a Linear gives
        return self.bias.to(x.dtype).expand((*x.shape[:-1], self.size)).clone()

    def extra_repr(self) -> str:
        return str(self.size)


def why_not(model: nn.Module, block: Block) -> str:
    """Why the layers of a block cannot be left out, whatever they compute; empty where they can."""
    for axis in (*block.sources, *block.sinks):
        if not _whole(model, axis):
            return f"{axis.parameter} belongs to more than this block, or to no Linear"
    owners = {_owner(axis) for axis in (*block.sources, *block.sinks)}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    beside = [a.parameter for a in block.axes if _owner(a) not in owners and a.parameter in parameters]
    return f"{beside[0]} is of its units too and would be left" if beside else ""


def check(model: nn.Module, blocks: Iterable[Block]) -> None:
    """Raises ModelError for a block that `why_not` has a reason for."""
    for block in blocks:
        if reason := why_not(model, block):
            raise ModelError(f"{block.name} cannot lose all its units: {reason}; keep at least one of it")


@torch.no_grad()
def replace(model: nn.Module, blocks: Iterable[Block]) -> None:
    """Put constants in the place of the layers of blocks, of which one unit is left, or more where `step` says so."""
    for name, module in _replacements(model, blocks).items():
        model.set_submodule(name, module)


@contextmanager
def replaced(model: nn.Module, blocks: Iterable[Block]) -> Iterator[None]:
    """Within it, the model is as `replace` leaves it."""
    new = _replacements(model, blocks)
    before = {name: model.get_submodule(name) for name in new}
    try:
        for name, module in new.items():
            model.set_submodule(name, module.train(before[name].training))
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def least(block: Block) -> list[int]:
    """The units that what lies between the layers of an empty block still sees."""
    return list(range(min(block.step, block.units)))


def shapes(kept: Kept, block: Block) -> list[int]:
    """The units that shapes and attributes are for: `kept` of a block, or `least` of an empty one."""
    return kept.of(block) or least(block)


def add_bias(module: nn.Module) -> Tensor:
    """The bias of a Linear or Conv1D, zeros where it had none."""
    bias: Any = getattr(module, "bias", None)
    if bias is None:
        bias = module.bias = nn.Parameter(_bias(module))
    return bias


def _replacements(model: nn.Module, blocks: Iterable[Block]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for block in blocks:
        for axis in block.sources:
            found[_owner(axis)] = Zeros(axis.per_unit * len(least(block)))
        for axis in block.sinks:
            module = model.get_submodule(_owner(axis))
            bias: Any = getattr(module, "bias", None)
            found[_owner(axis)] = Constant(nn.Parameter(_bias(module)) if bias is None else bias)
    return found


def _whole(model: nn.Module, axis: Axis) -> bool:
    """Whether the layer of an axis makes or reads the units of its block alone."""
    module = model.get_submodule(_owner(axis))
    dim = fields.output_dim(module) if axis.role == "source" else fields.input_dim(module)
    return (
        _outputs(module) is not None
        and axis.parameter.rpartition(".")[2] == "weight"
        and axis.dim == dim
        and axis.parts == 1
        and axis.indices.size == axis.size
    )


def _outputs(module: nn.Module) -> int | None:
    """Of a Linear or Conv1D."""
    dim, weight = fields.output_dim(module), getattr(module, "weight", None)
    return weight.shape[dim] if dim is not None and isinstance(weight, Tensor) and weight.dim() == 2 else None


def _bias(module: nn.Module) -> Tensor:
    """Zeros for a layer that has none."""
    weight: Any = module.weight
    return weight.new_zeros(_outputs(module))


def _owner(axis: Axis) -> str:
    return axis.parameter.rpartition(".")[0]
