"""What can be cut out of a model, as data: blocks of units, and the indices of every unit in every parameter.

A *unit* is the smallest thing that leaves whole: an attention head (for grouped queries a key and value head with
the query heads that read it), an FFN channel, a channel between two convolutions. A *block* holds units of one kind
that may be cut one by one, for example the heads of one attention. An *axis* says where the units of a block lie along
one dimension of one parameter:

    source  its rows compute the unit                 query, key, value, fc_in: [out, in] dim 0
    sink    its columns read the unit, and no other   attention output, fc_out: [out, in] dim 1
            place does: with zeros there the network
            is exactly the one without the unit
    side    goes along with the unit                  biases, a table with a column for each head

A cut takes the indices of a unit out of every axis and lowers the attributes of `edits`. Masks, scores, costs,
budgets, shrinking and loading know nothing else of a model; who finds the blocks is `find.find_structure`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mptrain.core.errors import ModelError

Kind = Literal["heads", "ffn", "channels"]
Role = Literal["source", "sink", "side"]


@dataclass(frozen=True, eq=False)
class Axis:
    """Where the units of a block lie along dimension `dim` of a parameter or buffer.

    indices: int64 [units, n], of every unit, without repeats. size: of the dimension; indices of no unit stay.
    weights: elements of the parameter to an index. parts: blocks that cut the parameter along different dimensions;
    its elements count for each of them by their part.
    """

    parameter: str
    dim: int
    indices: np.ndarray
    role: Role
    size: int
    weights: int
    parts: int = 1

    @property
    def per_unit(self) -> int:
        return self.indices.shape[1]

    def kept(self, units: Sequence[int]) -> np.ndarray:
        """Ascending indices that stay when only `units` of the block stay."""
        stays = np.ones(self.size, dtype=bool)
        stays[self.indices.ravel()] = False
        stays[self.indices[list(units)].ravel()] = True
        return np.flatnonzero(stays)

    def _key(self) -> tuple[Any, ...]:
        shape = self.indices.shape
        rest = (self.role, self.size, self.weights, self.parts)
        return (self.parameter, self.dim, *rest, shape, self.indices.tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Axis) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


@dataclass(frozen=True)
class Edit:
    """An integer attribute of a module that counts units: it falls by `per_unit` for each that is cut.

    `config.NAME` is an attribute of the module's config, which then becomes the module's own. For an attribute that is
    a list or tuple, `item` is the place in it.
    """

    module: str
    attribute: str
    per_unit: int
    item: int | None = None


@dataclass(frozen=True)
class Block:
    """Units of one kind that may be cut one by one.

    layer: the module whose row of a report the block is in. heads: query heads to a unit, 0 for channels.
    fixed_params: parameters of the block that stay when units go (the bias of a sink). cores: modules in which
    attention between the units' own tokens happens. prunable False: named by `ignore`; counts in a budget but is left
    alone. step: as many units stay as it divides, or all; more than 1 where a kernel wants whole 16 bytes.
    """

    name: str
    kind: Kind
    units: int
    axes: tuple[Axis, ...]
    layer: str
    edits: tuple[Edit, ...] = ()
    heads: int = 0
    fixed_params: int = 0
    cores: tuple[str, ...] = ()
    prunable: bool = True
    step: int = 1

    def of_role(self, *roles: Role) -> tuple[Axis, ...]:
        return tuple(axis for axis in self.axes if axis.role in roles)

    @property
    def sources(self) -> tuple[Axis, ...]:
        return self.of_role("source")

    @property
    def sinks(self) -> tuple[Axis, ...]:
        return self.of_role("sink")

    @property
    def unit_params(self) -> int:
        """Parameters that leave with one unit."""
        return sum(axis.per_unit * axis.weights // axis.parts for axis in self.axes)

    @property
    def empty_params(self) -> int:
        """Parameters that stay when all units go: the constant that each sink's layer is then (dropped.py)."""
        return sum(axis.weights for axis in self.sinks)

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(axis.parameter for axis in self.axes))


@dataclass(frozen=True)
class Refusal:
    """Something that looks like units and cannot be cut. what: a block, or the parameters that are entangled."""

    what: str
    reason: str


@dataclass(frozen=True)
class Structure:
    """All blocks of a model in the order of its modules. name: of the architecture, for reports."""

    name: str
    blocks: tuple[Block, ...]
    refused: tuple[Refusal, ...] = ()

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    def __getitem__(self, name: str) -> Block:
        return next(block for block in self.blocks if block.name == name)

    def of_kind(self, *kinds: Kind) -> list[Block]:
        return [block for block in self.blocks if block.kind in kinds]

    def by_kind(self) -> list[Block]:
        """Heads first; the order in which budgets and scores are laid out, so that ties fall alike."""
        return self.of_kind("heads") + self.of_kind("ffn") + self.of_kind("channels")

    def prunable(self) -> list[Block]:
        """Those that may be cut, heads first."""
        return [block for block in self.by_kind() if block.prunable]

    def layers(self) -> dict[str, list[Block]]:
        """Blocks by layer, in order."""
        found: dict[str, list[Block]] = {}
        for block in self.blocks:
            found.setdefault(block.layer, []).append(block)
        return found


@dataclass
class Kept:
    """Units that stay, by name of the block; a block that is not named stays whole, one with none is left out of the
    model (dropped.py)."""

    units: dict[str, list[int]] = field(default_factory=dict)

    def of(self, block: Block) -> list[int]:
        found = self.units.get(block.name)
        return list(range(block.units)) if found is None else found

    def count(self, block: Block) -> int:
        found = self.units.get(block.name)
        return block.units if found is None else len(found)

    def cuts(self, block: Block) -> bool:
        return self.count(block) < block.units

    def drops(self, block: Block) -> bool:
        """Whether none of its units stays."""
        return self.count(block) == 0

    def check(self, structure: Structure) -> None:
        """Raises ModelError unless every entry names existing units, ascending and whole steps, and a block is left."""
        if all(self.drops(block) for block in structure):
            raise ModelError("kept units leave no block at all; keep some of one")
        blocks = {block.name: block for block in structure}
        for name, units in self.units.items():
            if name not in blocks:
                raise ModelError(f"kept units name the block {name!r}, but the model has {', '.join(blocks)}")
            limit = blocks[name].units
            if units and (sorted(set(units)) != units or units[0] < 0 or units[-1] >= limit):
                raise ModelError(
                    f"kept units of {name} must be ascending, without repeats, between 0 and {limit - 1};"
                    f" got {short(units)}"
                )
            if len(units) % blocks[name].step and len(units) < limit:
                raise ModelError(
                    f"kept units of {name} must be a multiple of {blocks[name].step}, which its kernel needs, or all;"
                    f" got {len(units)}"
                )


def short(value: Any) -> str:
    """repr of at most 80 characters, for errors."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
