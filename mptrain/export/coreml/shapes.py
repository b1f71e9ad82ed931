"""Which sizes a Core ML package takes: ranges or lists of batches and lengths, and inputs brought to them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import coremltools as ct
import numpy as np
import torch
from torch import Tensor

from mptrain.core.errors import UserError
from mptrain.core.signature import BATCH, Signature
from mptrain.export.torch import graphs
from mptrain.recipe import CoreMlShapes

log = logging.getLogger(__name__)

Axes = Mapping[str, Sequence[tuple[int, str]]]
"""of each input: (place, "batch" or "length") of the axes that may be flexible"""


def tensor_types(values: Mapping[str, Tensor], shapes: CoreMlShapes, axes: Axes, floats: Any) -> list[ct.TensorType]:
    """One RangeDim to each axis name, shared by the inputs: Core ML then knows that their lengths agree."""
    ranges = {
        name: ct.RangeDim(min(sizes), max(sizes), default=min(max(sizes), max(min(sizes), 2)))
        for name, sizes in flexible(shapes)
    }
    found = []
    for name, value in values.items():
        dtype = floats if value.is_floating_point() else np.int32
        if shapes.kind == "enumerated":
            pairs = [(b, n) for b in sorted(set(shapes.batch)) for n in sorted(set(shapes.length))]
            sizes = {tuple(_sized(axes[name], value, batch, length)) for batch, length in pairs}
            shape: Any = ct.EnumeratedShapes([list(one) for one in sorted(sizes)]) if len(sizes) > 1 else sizes.pop()
        else:
            shape = list(value.shape)
            for axis, axis_name in axes[name]:
                if axis_name in ranges:
                    shape[axis] = ranges[axis_name]
        found.append(ct.TensorType(name=name, shape=shape, dtype=dtype))
    return found


def sized_inside(example: Mapping[str, Tensor], shapes: CoreMlShapes, axes: Axes) -> dict[str, Tensor]:
    """The example at a size inside the shapes, its own where that is one: a text that is cut may lack its end token,
    which some models look for. At least 2 of a flexible axis, for torch takes a size of 1 as fixed."""
    sizes = {"batch": shapes.batch, "length": shapes.length}
    open_sizes = dict(flexible(shapes))
    given = {word: example[name].shape[place] for name, found in axes.items() for place, word in found}
    chosen = {
        name: min(max(found), max(2, min(found), given.get(name, 2))) if name in open_sizes else found[0]
        for name, found in sizes.items()
    }
    values = {}
    for name, value in example.items():
        value = value.to(torch.float32 if value.is_floating_point() else torch.int32)
        for axis, axis_name in axes[name]:
            repeats = [1] * value.dim()
            repeats[axis] = -(-chosen[axis_name] // value.shape[axis])
            value = value.repeat(repeats).narrow(axis, 0, chosen[axis_name])
        values[name] = value.clone(memory_format=torch.contiguous_format)  # strides of its own: they become guards
    return values


def fitted(batch: Mapping[str, Tensor], signature: Signature, shapes: CoreMlShapes) -> dict[str, Tensor]:
    """Calibration inputs at a size that the package takes: rows cut or repeated, texts cut or padded."""
    found = {}
    for name, axes in axes_of(signature).items():
        value = torch.as_tensor(batch[name])
        for axis, axis_name in axes:
            sizes = sorted(shapes.batch if axis_name == "batch" else shapes.length)
            count = value.shape[axis]
            if shapes.kind == "ranged":
                wanted = max(sizes[0], min(count, sizes[-1]))
            else:
                wanted = next((n for n in sizes if n >= count), sizes[-1])
            if axis == 0:
                value = value.repeat([-(-wanted // count), *[1] * (value.dim() - 1)])
            elif wanted > count:
                value = torch.nn.functional.pad(value, (0, wanted - count))
            value = value.narrow(axis, 0, wanted)
        found[name] = value
    return found


def flexible(shapes: CoreMlShapes) -> list[tuple[str, list[int]]]:
    found = {"batch": list(shapes.batch), "length": list(shapes.length)}
    return [(name, sizes) for name, sizes in found.items() if min(sizes) < max(sizes)]


def narrowed(shapes: CoreMlShapes, sizes: Any) -> CoreMlShapes:
    """Without the sizes that the model does not take. sizes: as `graphs.export` gives them, Dims named batch, length.

    Raises UserError for a list of sizes that holds such ones.
    """
    found = {dim.__name__: dim for free in graphs.leaves(sizes) for dim in free.values()}
    for name, given in flexible(shapes):
        if name not in found:
            continue
        low, high = max(min(given), found[name].min), min(max(given), found[name].max)
        if (low, high) == (min(given), max(given)):
            continue
        if shapes.kind == "enumerated":
            raise UserError(f"shapes.{name}: the model takes {low} to {high}, got {given}; leave the others out")
        log.warning("Core ML: shapes.%s is %s to %s, the model takes no others", name, low, high)
        shapes = shapes.model_copy(update={name: [low, high]})
    return shapes


def axes_of(signature: Signature) -> Axes:
    """Of each input the axes that a package may leave flexible: the batch, and the length of what has one."""
    return {
        port.name: [(place, "batch" if word == BATCH else "length") for place, word in port.free.items()]
        for port in signature.inputs
    }


def _sized(axes: Sequence[tuple[int, str]], value: Tensor, batch: int, length: int) -> list[int]:
    shape = list(value.shape)
    for axis, axis_name in axes:
        shape[axis] = batch if axis_name == "batch" else length
    return shape
