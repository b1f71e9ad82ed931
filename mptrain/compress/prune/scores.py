"""How movement scores lie over the weights: one flat vector, a slice of it for each weight and bias.

    attention weight [o, i], blocks r×c   [o/r, i/c]    its bias [o/r]
    fc_in weight [o, i], by row           [o, 1]        its bias [o]
    fc_out weight [o, i], by column       [1, i]        its bias [1]
    shared: the output projection         [units]       no bias

An element of the weight belongs to exactly one score; a shared score stands for all
parameters of its unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mptrain.compress.structure.blocks import Attention, Structure
from mptrain.core.errors import UserError
from mptrain.recipe import Movement


@dataclass(frozen=True)
class Group:
    """Scores of one weight or bias, a slice of the flat score vector."""

    kind: str  # "heads" or "ffn"
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

    def add(kind: str, parameter: str, shape: tuple[int, ...], size: tuple[int, ...]) -> None:
        start = groups[-1].start + groups[-1].numel if groups else 0
        groups.append(Group(kind, parameter, layer, start, shape, size))

    for kind, block in structure.prunable():
        if config.score == "shared":
            add(kind, f"{block.output}.weight", (block.units,), (block.unit_params,))
            layer += 1
            continue
        for name in block.linears:
            linear = model.get_submodule(name)
            rows, columns = model.get_parameter(f"{name}.weight").shape
            if isinstance(block, Attention):
                r, c = _attention_block(config, name, rows, columns)
            else:
                r, c = (rows, 1) if name == block.output else (1, columns)
            add(kind, f"{name}.weight", (rows // r, columns // c), (r, c))
            if linear.bias is not None:
                add(kind, f"{name}.bias", (rows // r,), (r,))
            layer += 1
    return groups


def _attention_block(config: Movement, name: str, rows: int, columns: int) -> tuple[int, int]:
    r, c = config.attention_block
    if r < 1 or c < 1 or rows % r or columns % c:
        raise UserError(
            f"prune.attention_block: {r}×{c} does not divide {name} with {rows}×{columns} weights."
            f" Choose numbers that do, e.g. [{math.gcd(rows, r) or rows}, {math.gcd(columns, c) or columns}]."
        )
    return r, c
