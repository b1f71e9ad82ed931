"""Units by the place of their block among those of its kind: of models with one attention and FFN to a layer."""

from __future__ import annotations

import random
from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

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


def halved(structure: Structure, seed: int = 0) -> Kept:
    """About half of the units of every block, at random."""
    draw = random.Random(seed)
    return Kept({b.name: sorted(draw.sample(range(b.units), max(1, b.units // 2))) for b in structure})


@torch.no_grad()
def zero_sinks(model: nn.Module, structure: Structure, kept: Kept) -> nn.Module:
    """Mask in place what is not kept: the reference for a shrunk model."""
    for block in structure:
        gone = np.setdiff1d(np.arange(block.units), kept.of(block))
        for axis in block.sinks:
            model.get_parameter(axis.parameter).index_fill_(axis.dim, torch.from_numpy(axis.indices[gone].ravel()), 0.0)
    return model
