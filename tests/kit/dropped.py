"""Small models of which whole blocks are left out."""

from __future__ import annotations

import torch
from torch import nn

from mptrain.compress.structure.blocks import Kept
from mptrain.compress.structure.find import find_structure
from mptrain.compress.structure.shrink import shrink


def without(model: nn.Module, heads: int | None = 0, ffn: int | None = 1) -> nn.Module:
    """In place, without the attention and the FFN of these places among their kind; what they gave, at random."""
    structure = find_structure(model)
    chosen = [structure.of_kind(kind)[i] for kind, i in (("heads", heads), ("ffn", ffn)) if i is not None]
    shrink(model, structure, Kept({block.name: [] for block in chosen}))
    draw = torch.Generator().manual_seed(0)
    for block in chosen:
        bias = model.get_submodule(block.sinks[0].parameter.rpartition(".")[0]).bias
        bias.data = torch.randn(bias.shape, generator=draw)
    return model
