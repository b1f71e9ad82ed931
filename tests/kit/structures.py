"""Units by the place of their block among those of its kind: of models with one attention and FFN to a layer."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

from mptrain.compress.structure.blocks import Kept, Structure

Units = Mapping[int, list[int]]


def keep(structure: Structure, heads: Units | None = None, ffn: Units | None = None) -> Kept:
    """{index: units} of the attentions and of the FFNs."""
    found = {structure.of_kind("heads")[i].name: units for i, units in (heads or {}).items()}
    return Kept(found | {structure.of_kind("ffn")[i].name: units for i, units in (ffn or {}).items()})


def by_index(structure: Structure, kept: Kept) -> SimpleNamespace:
    """`keep` read back: the units of `heads` and `ffn` by index, of blocks that `kept` names."""
    parts = {
        kind: {i: kept.units[b.name] for i, b in enumerate(structure.of_kind(kind)) if b.name in kept.units}
        for kind in ("heads", "ffn")
    }
    return SimpleNamespace(**parts)


def sink(block) -> str:
    """The module of the one Linear that reads a block."""
    (axis,) = block.sinks
    return axis.parameter.removesuffix(".weight")
