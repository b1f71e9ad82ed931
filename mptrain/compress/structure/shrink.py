"""Cutting units out of a model for good: smaller Linears, same outputs as with the units masked.

q, k, v: rows of the kept heads      o:      columns of the kept heads
fc_in:   rows of the kept channels   fc_out: columns of the kept channels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.compress.structure.blocks import (
    Attention,
    Block,
    Kept,
    Structure,
    check_not_shared,
    counts,
    find_structure,
)
from mptrain.compress.structure.families import FAMILIES
from mptrain.core.errors import ModelError
from mptrain.core.hooks import is_quantized


@dataclass(frozen=True)
class LinearSlice:
    """What stays of a Linear: int64 indices of rows (outputs) and columns (inputs); None keeps all."""

    rows: Tensor | None = None
    cols: Tensor | None = None


def linear_slices(structure: Structure, kept: Kept) -> dict[str, LinearSlice]:
    """What stays of every Linear that changes, by module name. Raises ModelError when `kept` does not fit."""
    kept.check(structure)
    slices: dict[str, LinearSlice] = {}
    for a in structure.attention:
        if (units := _changed(kept.heads, a)) is not None:
            queries = _expand(units, a.group * a.head_dim)
            keys = _expand(units, a.head_dim)
            slices[a.q] = LinearSlice(rows=queries)
            slices[a.k] = slices[a.v] = LinearSlice(rows=keys)
            slices[a.o] = LinearSlice(cols=queries)
    for f in structure.ffn:
        if (units := _changed(kept.ffn, f)) is not None:
            channels = _expand(units, 1)
            slices |= {name: LinearSlice(rows=channels) for name in f.fc_in}
            slices[f.fc_out] = LinearSlice(cols=channels)
    return slices


@torch.no_grad()
def shrink(model: nn.Module, structure: Structure, kept: Kept) -> nn.Module:
    """Cut everything that is not kept, in place, and return the model.

    Modules stay the same objects, cut parameters are new ones. `config.mptrain_structure`
    then says how many units each block has. Shrinking a shrunk model again is fine.
    Raises ModelError when `kept` does not fit, a cut weight is tied to another module, or
    the model carries NNCF quantizers, whose per-channel ranges have the old shapes.
    """
    if is_quantized(model):
        raise ModelError("a quantized model cannot be shrunk: detach the quantizers first, then attach the sliced ones")
    slices = linear_slices(structure, kept)
    check_not_shared(model, slices)
    for name, cut in slices.items():
        _cut(model.get_submodule(name), cut)
    for a in structure.attention:
        if (units := _changed(kept.heads, a)) is not None:
            _update_attention(model, a, units)
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.mptrain_structure = counts(find_structure(model))
    return model


def _cut(linear: nn.Module, cut: LinearSlice) -> None:
    assert isinstance(linear, nn.Linear)
    weight = linear.weight
    if cut.rows is not None:
        linear.weight = _parameter(weight[cut.rows.to(weight.device)], weight)
        if linear.bias is not None:
            linear.bias = _parameter(linear.bias[cut.rows.to(weight.device)], linear.bias)
        linear.out_features = len(cut.rows)
    if cut.cols is not None:
        linear.weight = _parameter(linear.weight[:, cut.cols.to(weight.device)], weight)
        linear.in_features = len(cut.cols)


def _update_attention(model: nn.Module, block: Attention, units: Sequence[int]) -> None:
    family, module = FAMILIES[block.family], model.get_submodule(block.module)
    heads = len(units) * block.group
    if family.heads is not None:
        setattr(module, family.heads, heads)
    if family.width is not None:
        setattr(module, family.width, heads * block.head_dim)
    if family.bias_table is not None:
        table = getattr(module, family.bias_table)
        columns = _expand(units, block.group).to(table.device)
        setattr(module, family.bias_table, _parameter(table[:, columns], table))


def _changed(kept: dict[int, list[int]], block: Block) -> list[int] | None:
    units = kept.get(block.index)
    return None if units is None or len(units) == block.units else units


def _expand(units: Sequence[int], size: int) -> Tensor:
    """Indices of `size` neighbours for every unit: [1, 3], 2 -> [2, 3, 6, 7]."""
    start = torch.tensor(units, dtype=torch.int64)[:, None] * size
    return (start + torch.arange(size)).flatten()


def _parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(values.contiguous(), requires_grad=like.requires_grad)
