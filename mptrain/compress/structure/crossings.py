"""Parameters that blocks cut along several dimensions: a convolution's rows by one block, its columns by another.

Alone each block counts for its share of such a parameter, so that shares add up to the whole. Together they leave

    M · Π_d (1 - r_d),   M what the parameter counts for, r_d the share of its dimension d that is cut

which is less than the shares that stay, M · (1 - Σ_d r_d / D). `Crossings.more` is the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from mptrain.compress.structure.blocks import Axis, Block

Weight = Callable[[Block, Axis], float]
"""what a whole parameter counts for, by one of the axes along which a block cuts it"""


@dataclass(frozen=True)
class _Side:
    """A block that cuts a parameter: `share` of its dimension to a unit."""

    block: Block
    dim: int
    share: float


class Crossings:
    """Of the axes of blocks with more than one part. weight: of each, the same for all of one parameter."""

    def __init__(self, blocks: Iterable[Block], weight: Weight) -> None:
        self._weights: dict[str, float] = {}
        self._sides: dict[str, list[_Side]] = {}
        for block in blocks:
            for axis in block.axes:
                if axis.parts > 1:
                    self._weights[axis.parameter] = weight(block, axis)
                    side = _Side(block, axis.dim, axis.per_unit / axis.size)
                    self._sides.setdefault(axis.parameter, []).append(side)

    def __bool__(self) -> bool:
        return any(self._weights.values())

    def more(self, counts: Mapping[str, int]) -> float:
        """What leaves beyond the shares of the blocks. counts: units that stay, by name; other blocks are whole."""
        total = 0.0
        for parameter, sides in self._sides.items():
            cut: dict[int, float] = {side.dim: 0.0 for side in sides}
            for side in sides:
                cut[side.dim] += side.share * (side.block.units - counts.get(side.block.name, side.block.units))
            left = 1.0
            for share in cut.values():
                left *= 1.0 - share
            total += self._weights[parameter] * (1.0 - left - sum(cut.values()) / len(cut))
        return total
