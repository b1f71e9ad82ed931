"""The proof that a block is what it says: with half of its units cut out, the model computes what it computes with them
masked, and not what it computed before.

    masked   zeros in the columns of the sinks that belong to the units
    shrunk   the units' indices taken out of every axis, attributes edited

on random values, and in every way of ways.py with another half. Both are made by hanging other tensors into the modules
and taking them out again; no copy of the model is made. Of a block that is left out whole (dropped.py) the same is
proved of none of its units.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mptrain.compress.structure import attributes, dropped
from mptrain.compress.structure.blocks import Block, Edit
from mptrain.compress.structure.dataflow.stand_in import Slots
from mptrain.compress.structure.dataflow.ways import Way

TOLERANCE = 5e-6
"""of the largest output; float32 in another order of sums differs by a tenth of it"""


class Bench:
    """A model in `stand_in`, and the ways to run it in which masked and shrunk must agree."""

    def __init__(self, model: nn.Module, slots: Slots, ways: Sequence[Way]) -> None:
        self._model, self._slots, self._ways = model, slots, ways

    def fault(self, blocks: Sequence[Block]) -> str | None:
        """What is wrong when all `blocks` are cut at once; None: nothing is. Every block has its edits."""
        blocks = [block for block in blocks if block.units > 1]
        if not blocks:
            return None
        for seed, way in enumerate(self._ways):
            where = f"{way.name}, " if way.name else ""
            kept = {block.name: half(block, seed) for block in blocks}
            with self._slots.swapped(self._masked(blocks, kept)):
                expected = way.run()
            if same(expected, way.outputs, 1e-9):
                return f"{where}its units change nothing in what the model computes"
            try:
                shrunk = self._slots.swapped(self._shrunk(blocks, kept))
                with shrunk, edited(self._model, blocks, kept), NoEmptyAttention():
                    found = way.run()
            except Exception as error:  # whatever the model's code raises when a size is not what it thinks
                return f"{where}the smaller model does not run ({type(error).__name__}: {_first_line(error)})"
            if not same(found, expected, TOLERANCE):
                return f"{where}the smaller model computes something else than the masked one"
        return None

    def fault_without(self, blocks: Sequence[Block]) -> str | None:
        """What is wrong when all `blocks` are left out whole; None: nothing is."""
        none: dict[str, list[int]] = {block.name: [] for block in blocks}
        seen = {block.name: dropped.least(block) for block in blocks}
        for way in self._ways:
            where = f"{way.name}, " if way.name else ""
            with self._slots.swapped(self._masked(blocks, none)):
                expected = way.run()
            try:
                small = self._slots.swapped(self._shrunk(blocks, seen))
                with small, edited(self._model, blocks, seen), dropped.replaced(self._model, blocks):
                    found = way.run()
            except Exception as error:
                return f"{where}the model does not run without it ({type(error).__name__}: {_first_line(error)})"
            if not same(found, expected, TOLERANCE):
                return f"{where}the model without it computes something else than with all of it masked"
        return None

    def _masked(self, blocks: Sequence[Block], kept: Mapping[str, list[int]]) -> dict[str, Tensor]:
        new: dict[str, Tensor] = {}
        for block in blocks:
            gone = np.setdiff1d(np.arange(block.units), kept[block.name])
            for axis in block.sinks:
                values = new.setdefault(axis.parameter, self._slots.now(axis.parameter).clone())
                values.index_fill_(axis.dim, torch.from_numpy(axis.indices[gone].ravel()), 0.0)
        return new

    def _shrunk(self, blocks: Sequence[Block], kept: Mapping[str, list[int]]) -> dict[str, Tensor]:
        stays: dict[tuple[str, int], np.ndarray] = {}
        for block in blocks:
            for axis in block.axes:
                key, mine = (axis.parameter, axis.dim), axis.kept(kept[block.name])
                stays[key] = np.intersect1d(stays[key], mine) if key in stays else mine
        new: dict[str, Tensor] = {}
        for (name, dim), indices in stays.items():
            values = new.get(name, self._slots.now(name))
            new[name] = values.index_select(dim, torch.from_numpy(indices))
        return new


class NoEmptyAttention(TorchFunctionMode):
    """Attention without a head is an error: a tried edit may leave none, and torch 2.7 then divides by their number,
    which ends the process."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = [*args[:3], *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)]
            if not all(tensor.numel() for tensor in given):
                raise ValueError("attention without heads")
        return func(*args, **kwargs)


def half(block: Block, seed: int) -> list[int]:
    """About half of the units; not the same number for every seed, for a kernel may want even ones."""
    wanted = block.units // 2 + seed % 2
    count = max(block.step, min(block.units - 1, wanted // block.step * block.step))
    return sorted(random.Random(f"{seed} {block.name}").sample(range(block.units), count))


@contextmanager
def edited(model: nn.Module, blocks: Sequence[Block], kept: Mapping[str, list[int]]) -> Iterator[None]:
    """With attributes lowered by what is cut."""
    undo: list[tuple[Any, str, Any]] = []
    try:
        for block in blocks:
            for edit in block.edits:
                module = model.get_submodule(edit.module)
                undo.append(_before(module, edit))
                now = attributes.read(module, edit.attribute, edit.item)
                gone = block.units - len(kept[block.name])
                attributes.write(module, edit.attribute, edit.item, now - edit.per_unit * gone)
        yield
    finally:
        for owner, name, value in reversed(undo):
            if value is _ABSENT:
                vars(owner).pop(name, None)
            else:
                vars(owner)[name] = value


_ABSENT = object()


def _before(module: nn.Module, edit: Edit) -> tuple[Any, str, Any]:
    """(owner, name, value) of what an edit changes."""
    if not edit.attribute.startswith(attributes.CONFIG):
        return module, edit.attribute, vars(module).get(edit.attribute, _ABSENT)
    if isinstance(module.config, attributes.OwnConfig):
        name = edit.attribute.removeprefix(attributes.CONFIG)
        return module.config, name, vars(module.config).get(name, _ABSENT)
    return module, "config", module.config


def same(a: Sequence[Tensor], b: Sequence[Tensor], tolerance: float) -> bool:
    return len(a) == len(b) and all(_close(x, y, tolerance) for x, y in zip(a, b))


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape:
        return False
    if not a.numel():
        return True
    scale = max(1.0, float(a.nan_to_num(0, 0, 0).abs().max()))
    return torch.allclose(a, b, atol=tolerance * scale, rtol=0, equal_nan=True)


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 120 else f"{text[:117]}…"
