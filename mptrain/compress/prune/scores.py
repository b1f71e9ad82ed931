"""How movement scores lie over the weights: one flat vector, a slice of it for each weight and bias.

    weight of heads [o, i], blocks r×c    [o/r, i/c]    its bias [o/r]
    source weight [o, i], by row          [o, 1]        its bias [o]
    sink weight [o, i], by column         [1, i]        its bias [1]
    shared: the first sink                [units]       no bias

An element of the weight belongs to exactly one score; a shared score stands for all
parameters of its unit. Where a weight is kept as [i, o], or has more dimensions, the same
holds along its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mptrain.compress.structure.blocks import Axis, Block, Structure
from mptrain.core.errors import UserError
from mptrain.recipe import Movement


@dataclass(frozen=True)
class Group:
    """Scores of one weight or bias, a slice of the flat score vector."""

    block: str
    parameter: str
    layer: int  # sparsified layer, for the mean of the regularizer
    start: int
    shape: tuple[int, ...]  # of the scores
    size: tuple[int, ...]  # elements of the parameter to a score, by dimension

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def factor(self) -> int:
        return math.prod(self.size)

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.start + self.numel].view(self.shape)

    def pool(self, values: Tensor) -> Tensor:
        """Sum of the elements of each score: parameter shape -> score shape."""
        split = [n for pair in zip(self.shape, self.size) for n in pair]
        return values.reshape(split).sum(tuple(range(1, len(split), 2)))

    def spread(self, values: Tensor) -> Tensor:
        """Score shape -> the parameter's shape, or one that broadcasts to it."""
        for dim, (n, size) in enumerate(zip(self.shape, self.size)):
            if n > 1 and size > 1:
                values = values.repeat_interleave(size, dim)
        return values


def quantile(scores: Tensor, repeat: int, q: float) -> Tensor:
    """torch.quantile of `scores` with every element there `repeat` times; 0-d."""
    ordered = torch.sort(scores).values
    position = q * (len(scores) * repeat - 1)
    low, high = math.floor(position), math.ceil(position)
    a, b = ordered[low // repeat], ordered[high // repeat]
    return a + (b - a) * (position - low)


def layout(model: nn.Module, structure: Structure, config: Movement) -> list[Group]:
    """Groups of all prunable blocks in order, one after the other in the flat vector.

    Raises UserError when `attention_block` does not divide an attention weight.
    """
    groups: list[Group] = []
    layer = 0

    def add(block: Block, parameter: str, shape: Sequence[int], size: Sequence[int]) -> None:
        start = groups[-1].start + groups[-1].numel if groups else 0
        groups.append(Group(block.name, parameter, layer, start, tuple(shape), tuple(size)))

    for block in structure.prunable():
        if config.score == "shared":
            add(block, block.sinks[0].parameter, (block.units,), (block.unit_params,))
            layer += 1
            continue
        for axis in (*block.sources, *block.sinks):
            shape = model.get_parameter(axis.parameter).shape
            size = _score_size(config, block, axis, shape)
            add(block, axis.parameter, [n // part for n, part in zip(shape, size)], size)
            rows = size[_output_dim(axis)]
            if (bias := _bias(model, axis)) is not None:
                add(block, bias, [shape[_output_dim(axis)] // rows], [rows])
            layer += 1
    return groups


def _score_size(config: Movement, block: Block, axis: Axis, shape: torch.Size) -> list[int]:
    """Elements of the parameter to a score, by dimension."""
    if block.kind != "heads" or len(shape) != 2:
        return [1 if d == axis.dim else n for d, n in enumerate(shape)]
    (r, c), out = config.attention_block, _output_dim(axis)
    rows, columns = shape[out], shape[1 - out]
    if r < 1 or c < 1 or rows % r or columns % c:
        raise UserError(
            f"prune.attention_block: {r}×{c} does not divide {axis.parameter.removesuffix('.weight')} with"
            f" {rows}×{columns} weights."
            f" Choose numbers that do, e.g. [{math.gcd(rows, r) or rows}, {math.gcd(columns, c) or columns}]."
        )
    return [r, c] if out == 0 else [c, r]


def _output_dim(axis: Axis) -> int:
    if axis.role == "source":
        return axis.dim
    return 1 if axis.dim == 0 else 0


def _bias(model: nn.Module, axis: Axis) -> str | None:
    module, _, name = axis.parameter.rpartition(".")
    bias = getattr(model.get_submodule(module), "bias", None)
    return f"{module}.bias" if name == "weight" and isinstance(bias, nn.Parameter) else None
