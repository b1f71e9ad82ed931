"""Cutting units out of a model for good: smaller parameters, same outputs as with the units masked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from mptrain.compress.structure import attributes, dropped, saved
from mptrain.compress.structure.blocks import Block, Edit, Kept, Structure
from mptrain.core.errors import ModelError
from mptrain.core.hooks import is_quantized

Slices = dict[str, dict[int, Tensor]]
"""What stays of each parameter that is cut, by name and dimension: ascending int64 indices."""


def slices_of(structure: Structure, kept: Kept) -> Slices:
    """What stays of every parameter that changes. Raises ModelError when `kept` does not fit."""
    kept.check(structure)
    found: dict[str, dict[int, np.ndarray]] = {}
    for block in structure:
        for axis in block.axes if kept.cuts(block) else ():
            stays, by_dim = axis.kept(dropped.shapes(kept, block)), found.setdefault(axis.parameter, {})
            # blocks may own different columns of one parameter
            by_dim[axis.dim] = np.intersect1d(by_dim[axis.dim], stays) if axis.dim in by_dim else stays
    return {name: {dim: torch.from_numpy(stays) for dim, stays in by.items()} for name, by in found.items()}


@torch.no_grad()
def shrink(model: nn.Module, structure: Structure, kept: Kept) -> nn.Module:
    """Cut everything that is not kept, in place, and return the model.

    Modules stay the same objects, cut parameters are new ones in every module that shares them; layers of blocks that
    keep nothing are replaced by constants (dropped.py).
    `config.mptrain_structure` then says what shapes and attributes differ from what the config builds (saved.py).
    Shrinking a shrunk model again is fine.
    Raises ModelError when `kept` does not fit, a cut weight is tied to another module, a block cannot be left out, or
    the model carries NNCF quantizers, whose per-channel ranges have the old shapes.
    """
    if is_quantized(model):
        raise ModelError("a quantized model cannot be shrunk: detach the quantizers first, then attach the sliced ones")
    slices = slices_of(structure, kept)
    smaller, empty = ([b for b in structure if chosen(b)] for chosen in (kept.cuts, kept.drops))
    check_not_shared(model, smaller)
    dropped.check(model, empty)
    cut(model, slices)
    edits = [(edit, b.units - len(dropped.shapes(kept, b))) for b in smaller for edit in b.edits]
    edit(model, edits)
    dropped.replace(model, empty)
    saved.remember(model, structure, kept, slices, [edit for edit, _ in edits])
    return model


def cut(model: nn.Module, slices: Mapping[str, Mapping[int, Tensor]]) -> None:
    """Keep these indices of the parameters and buffers, wherever they are used."""
    for name, by_dim in slices.items():
        old = attributes.tensor(model, name)
        new: Tensor = old.detach()
        for dim, stays in by_dim.items():
            new = new.index_select(dim, stays.to(new.device))
        attributes.replace(model, {id(old): new})


def edit(model: nn.Module, edits: list[tuple[Edit, int]]) -> None:
    """Lower attributes by what that many units are of them."""
    for change, units in edits:
        module = model.get_submodule(change.module)
        now = attributes.read(module, change.attribute, change.item)
        attributes.write(module, change.attribute, change.item, now - change.per_unit * units)


def check_not_shared(model: nn.Module, blocks: Iterable[Block]) -> None:
    """Raises ModelError if a parameter of `blocks` is also used elsewhere: cutting one would change the other."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            users.setdefault(id(tensor), []).append(name)
    for block in blocks:
        for axis in block.axes:
            owner = axis.parameter.rpartition(".")[0]
            others = [user for user in users[id(attributes.tensor(model, axis.parameter))] if user != owner]
            if others:
                raise ModelError(
                    f"{owner} shares its weight with {', '.join(others)}, so units cannot be cut out of one alone."
                    f" Untie them, or leave the layer alone with prune.ignore: [{owner}]."
                )
