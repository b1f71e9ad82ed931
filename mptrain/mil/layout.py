"""What the operations of a MIL program do that move values: shapes, slices, gathers.

Semantics are those of coremltools' `converters.mil.mil.ops.defs`, iOS 15 to 18; conventions
as in math.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Operation = Callable[..., Any]


def as_list(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [values]


def reshape(x: Tensor, shape: Tensor) -> Tensor:
    """0 keeps the axis, -1 is inferred."""
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape.tolist())])


def transpose(x: Tensor, perm: Tensor) -> Tensor:
    return x.permute(perm.tolist())


def expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    rank = x.dim() + axes.numel()
    for axis in sorted(int(a) % rank for a in axes.reshape(-1)):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes.reshape(-1).tolist()))


def concat(values: Any, axis: Tensor, interleave: Any = False) -> Tensor:
    parts = [part.reshape(1) if part.dim() == 0 else part for part in as_list(values)]
    if bool(interleave):
        return torch.stack(parts, int(axis) + 1).flatten(int(axis), int(axis) + 1)
    return torch.cat(parts, int(axis))


def stack(values: Any, axis: Tensor) -> Tensor:
    return torch.stack(as_list(values), int(axis))


def split(x: Tensor, axis: Tensor, num_splits: Any = None, split_sizes: Any = None) -> tuple[Tensor, ...]:
    if split_sizes is not None:
        return torch.split(x, split_sizes.tolist(), int(axis))
    return torch.chunk(x, int(num_splits), int(axis))


def tile(x: Tensor, reps: Tensor) -> Tensor:
    return x.repeat(reps.tolist())


def pad(x: Tensor, pad: Tensor, mode: str = "constant", constant_val: Any = 0.0) -> Tensor:
    flat = pad.tolist()
    pairs = [n for i in reversed(range(0, len(flat), 2)) for n in flat[i : i + 2]]
    if mode == "constant":
        return F.pad(x, pairs, value=float(constant_val))
    while len(pairs) > 2 and not any(pairs[-2:]):  # torch takes none for the axes before
        pairs = pairs[:-2]
    return F.pad(x, pairs, mode=mode)


def fill(shape: Tensor, value: Any = 0.0) -> Tensor:
    value = torch.as_tensor(value)
    return value.expand(shape.tolist()).clone()


def fill_like(ref_tensor: Tensor, value: Any = 0.0) -> Tensor:
    return torch.as_tensor(value).expand(ref_tensor.shape).clone()


def shape_of(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int64)


def range_1d(end: Tensor, start: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


def _slices(
    x: Tensor, begin: Tensor, end: Tensor, stride: Any, begin_mask: Any, end_mask: Any, squeeze_mask: Any
) -> tuple[Any, ...]:
    """NumPy's indices of a slice_by_index: negative positions count from the end, masks replace an end by none."""
    rank = x.dim()
    strides = [1] * rank if stride is None else stride.tolist()
    from_start, to_end, one = (
        [False] * rank if mask is None else mask.tolist() for mask in (begin_mask, end_mask, squeeze_mask)
    )
    found: list[Any] = []
    for axis, (first, last) in enumerate(zip(begin.tolist(), end.tolist())):
        if one[axis]:
            found.append(first)
        else:
            found.append(slice(None if from_start[axis] else first, None if to_end[axis] else last, strides[axis]))
    return tuple(found)


def slice_by_index(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> Tensor:
    at = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if any(isinstance(part, slice) and part.step < 0 for part in at):  # torch has no negative steps
        return torch.from_numpy(np.ascontiguousarray(x.numpy()[at]))
    return x[at]


def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> Tensor:
    found = x.clone()
    found[_slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)] = update
    return found


def slice_by_size(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    for axis, (first, count) in enumerate(zip(begin.tolist(), size.tolist())):
        x = x.narrow(axis, first, x.shape[axis] - first if count == -1 else count)
    return x


def gather(x: Tensor, indices: Tensor, axis: Any = 0, batch_dims: Any = 0, validate_indices: Any = False) -> Tensor:
    """x.shape[:axis] + indices.shape[batch_dims:] + x.shape[axis+1:]."""
    axis, batch = int(axis) % x.dim(), int(batch_dims)
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    if batch == 0:
        picked = x.index_select(axis, indices.reshape(-1))
        return picked.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])
    lead = x.shape[:batch]
    rows = x.reshape(-1, *x.shape[batch:])
    places = indices.expand(*lead, *indices.shape[batch:]).reshape(-1, *indices.shape[batch:])
    found = [gather(row, place, axis - batch) for row, place in zip(rows, places)]
    return torch.stack(found).reshape([*lead, *found[0].shape])


def gather_along_axis(x: Tensor, indices: Tensor, axis: Any = 0, validate_indices: Any = False) -> Tensor:
    axis = int(axis)
    return torch.gather(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices))


def gather_nd(x: Tensor, indices: Tensor, batch_dims: Any = 0, validate_indices: Any = False) -> Tensor:
    batch = int(batch_dims)
    if batch == 0:
        return x[tuple(indices.unbind(-1))]
    rows = [gather_nd(row, place, batch - 1) for row, place in zip(x, indices)]
    return torch.stack(rows)


_MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "update": lambda old, new: new,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "max": torch.maximum,
    "min": torch.minimum,
}


def scatter(
    data: Tensor, indices: Tensor, updates: Tensor, axis: Any = 0, mode: str = "add", validate_indices: Any = False
) -> Tensor:
    """One index after the other, so that repeated ones accumulate."""
    found = data.clone().movedim(int(axis), 0)
    for row, index in zip(updates.movedim(int(axis), 0), indices.tolist()):
        found[index] = _MODES[mode](found[index], row)
    return found.movedim(0, int(axis))


def scatter_along_axis(
    data: Tensor, indices: Tensor, updates: Tensor, axis: Any = 0, mode: str = "add", validate_indices: Any = False
) -> Tensor:
    axis = int(axis)
    places = torch.where(indices < 0, indices + data.shape[axis], indices)
    if mode == "update":
        return data.scatter(axis, places, updates)
    reduce = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    if mode == "sub":
        return data.scatter_reduce(axis, places, -updates, "sum")
    return data.scatter_reduce(axis, places, updates, reduce[mode])


def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, mode: str = "add", validate_indices: Any = False
) -> Tensor:
    found = data.clone()
    places = indices.reshape(-1, indices.shape[-1]).tolist()
    rows = updates.reshape(len(places), *data.shape[indices.shape[-1] :])
    for place, row in zip(places, rows):
        found[tuple(place)] = _MODES[mode](found[tuple(place)], row)
    return found


def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond.bool(), a, b)


def cumsum(x: Tensor, axis: Any = 0, exclusive: Any = False, reverse: Any = False) -> Tensor:
    axis = int(axis)
    x = x.flip(axis) if bool(reverse) else x
    total = x.cumsum(axis)
    total = total - x if bool(exclusive) else total
    return total.flip(axis) if bool(reverse) else total


def topk(
    x: Tensor,
    k: Any = 1,
    axis: Any = -1,
    ascending: Any = False,
    sort: Any = True,
    return_indices: Any = True,
    output_indices_dtype: str = "int32",
) -> Any:
    count = x.shape[int(axis)] if int(k) == -1 else int(k)
    values, indices = torch.topk(x, count, int(axis), largest=not bool(ascending), sorted=True)
    return (values, indices) if bool(return_indices) else values


def argsort(x: Tensor, axis: Any = -1, ascending: Any = False) -> Tensor:
    return torch.argsort(x, dim=int(axis), descending=not bool(ascending), stable=True)


def one_hot(
    indices: Tensor, one_hot_vector_size: Tensor, axis: Any = -1, on_value: Any = 1, off_value: Any = 0
) -> Tensor:
    hot = F.one_hot(indices, int(one_hot_vector_size)).bool()
    return torch.where(hot, torch.as_tensor(on_value), torch.as_tensor(off_value)).movedim(-1, int(axis))


def band_part(x: Tensor, lower: Any = -1, upper: Any = -1) -> Tensor:
    if int(lower) >= 0:
        x = x.triu(-int(lower))
    return x.tril(int(upper)) if int(upper) >= 0 else x


def reverse(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.flip(tuple(range(x.dim())) if axes is None else tuple(axes.tolist()))


def flatten2d(x: Tensor, axis: Any = 1) -> Tensor:
    return x.reshape(int(np.prod(x.shape[: int(axis)])), -1)


def pixel_shuffle(x: Tensor, upscale_factor: Tensor) -> Tensor:
    return F.pixel_shuffle(x, int(upscale_factor))


def classify(probabilities: Tensor, classes: list[Any]) -> tuple[Any, Tensor]:
    """The label of the highest score, and the scores; Core ML makes a dictionary of them."""
    return classes[int(probabilities.reshape(-1).argmax())], probabilities


LAYOUT: dict[str, Operation] = {
    "reshape": reshape,
    "transpose": transpose,
    "expand_dims": expand_dims,
    "squeeze": squeeze,
    "concat": concat,
    "stack": stack,
    "split": split,
    "tile": tile,
    "pad": pad,
    "fill": fill,
    "fill_like": fill_like,
    "shape": shape_of,
    "range_1d": range_1d,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "scatter": scatter,
    "scatter_along_axis": scatter_along_axis,
    "scatter_nd": scatter_nd,
    "select": select,
    "cumsum": cumsum,
    "topk": topk,
    "argsort": argsort,
    "one_hot": one_hot,
    "band_part": band_part,
    "reverse": reverse,
    "flatten2d": flatten2d,
    "pixel_shuffle": pixel_shuffle,
    "classify": classify,
    "non_zero": lambda x: x.nonzero(),
}
