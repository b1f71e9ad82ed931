"""What coremltools 9.0 lacks for current torch, NumPy and transformers, for the length of a `with` block.

    new_ones, __and__, __or__, where.ScalarOther, diff, alias   operations its torch frontend does not know
    new_zeros, where of numbers    make floats of integers, and a result without axes
    ops._cast                      calls int() of an array with one axis, which NumPy >= 2.4 refuses (coremltools#2633)
    TorchConverter._add_const      stores a weight as the integers or tables we learned (see coreml_constants.py)
    tqdm                           three progress bars to a conversion

These hooks are private, so they are tied to the version in the spec, `CoreMl.packages`: with another coremltools
`compatible` refuses and says what to install. Nothing stays patched after the block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.frontend.torch import ops
from coremltools.converters.mil.frontend.torch.converter import TorchConverter
from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY
from coremltools.converters.mil.frontend.torch.utils import NUM_TO_DTYPE_STRING, sanitize_op_kind
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.ops.defs._utils import promote_input_dtypes
from coremltools.converters.mil.mil.passes import pass_pipeline

from mptrain.core.errors import ExportError
from mptrain.core.patch import replaced
from mptrain.recipe import CoreMl

Constant = Callable[[str], Any]
Translation = Callable[[Any, Any], None]


@contextmanager
def compatible(**more: Translation) -> Iterator[None]:
    """more: further operations and their translations. Raises UserError for a coremltools the hooks do not fit."""
    CoreMl.check_installed()
    known = _TORCH_OPS_REGISTRY.name_to_func_mapping
    before = dict(known)
    added = {name: function for name, function in (_missing() | more).items() if name not in known} | _mistaken()
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    known.update(added)
    try:
        with replaced(ops, _cast=_cast, _tqdm=_no_bar), replaced(pass_pipeline, tqdm=_no_bar):
            yield
    finally:
        logger.setLevel(level)
        known.clear()
        known.update(before)


@contextmanager
def storing(constants: Mapping[str, Constant]) -> Iterator[None]:
    """constants: by name of a parameter in the traced graph, a function of the same name that adds its constexpr."""
    add_const = TorchConverter._add_const

    def stored(self: TorchConverter, name: str, value: Any) -> None:
        if name in constants:
            self.context.add(constants[name](name))
        else:
            add_const(self, name, value)

    with replaced(TorchConverter, _add_const=stored):
        yield


def _no_bar(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    return items


def supported(kind: str) -> bool:
    """Whether the torch frontend translates an operation, "aten::add.Tensor"; ask inside `compatible`."""
    return _TORCH_OPS_REGISTRY.get_func(sanitize_op_kind(kind)) is not None


def _missing() -> dict[str, Translation]:
    names = {
        _new_ones: ("new_ones",),
        _alias: ("alias",),
        _and: ("__and__", "and", "__and__.tensor"),
        _or: ("__or__", "or", "__or__.tensor"),
        _where: ("where.scalarother", "where.scalar"),
        _diff: ("diff",),
        _nothing: ("_assert_tensor_metadata",),
    }
    return {name: function for function, found in names.items() for name in found}


def _mistaken() -> dict[str, Translation]:
    return {"new_zeros": _new_zeros, "where": _where, "where.self": _where}


def _inputs(context: Any, node: Any) -> list[Any]:
    return ops._get_inputs(context, node)


def _new_ones(context: Any, node: Any) -> None:
    _filled(context, node, 1)


def _new_zeros(context: Any, node: Any) -> None:
    _filled(context, node, 0)


def _filled(context: Any, node: Any, value: int) -> None:
    """Of the type that is asked for, else of the tensor's own."""
    inputs = _inputs(context, node)
    shape = inputs[1]
    dtype = (node.kwinputs or {}).get("dtype")
    number = dtype[0] if dtype else (inputs[2].val if len(inputs) > 2 and inputs[2] is not None else None)
    if isinstance(number, str):
        number = context[number].val
    own = types.builtin_to_string(inputs[0].dtype)
    kind = own if number is None else NUM_TO_DTYPE_STRING[int(number)]
    if isinstance(shape, list):
        shape = mb.concat(values=shape, axis=0) if shape else None
    if shape is None or (shape.val is not None and np.size(shape.val) == 0):
        one = {"bool": np.bool_(value), "int32": np.int32(value)}.get(kind, np.float32(value))
        context.add(mb.const(val=one, name=node.name))
        return
    made = mb.fill(shape=shape, value=float(value), name=node.name if kind == "fp32" else f"{node.name}_filled")
    context.add(made if kind == "fp32" else mb.cast(x=made, dtype=kind, name=node.name))


def _alias(context: Any, node: Any) -> None:
    context.add(_inputs(context, node)[0], torch_name=node.name)


def _logical(context: Any, node: Any, operation: Any) -> None:
    x, y = _inputs(context, node)
    if not (types.is_bool(x.dtype) and types.is_bool(y.dtype)):
        raise ExportError(f"{node.name}: & and | of integers have no Core ML operation; compare first, then combine")
    context.add(operation(x=x, y=y, name=node.name))


def _and(context: Any, node: Any) -> None:
    _logical(context, node, mb.logical_and)


def _or(context: Any, node: Any) -> None:
    _logical(context, node, mb.logical_or)


def _where(context: Any, node: Any) -> None:
    """Of two numbers: `select` would have the shape of the numbers, none, for everything that reads it."""
    inputs = _inputs(context, node)
    if len(inputs) != 3 or inputs[1].rank or inputs[2].rank or not inputs[0].rank:
        ops.where(context, node)
        return
    condition, first, second = inputs
    first, second = promote_input_dtypes([first, second])
    condition = condition if types.is_bool(condition.dtype) else mb.cast(x=condition, dtype="bool")
    every = mb.fill_like(ref_tensor=condition, value=first)
    context.add(mb.select(cond=condition, a=every, b=second, name=node.name))


def _nothing(context: Any, node: Any) -> None:
    """An assertion of torch.export about dtypes; it has no result."""


def _diff(context: Any, node: Any) -> None:
    """First difference along the last axis, the only form that transformers uses."""
    inputs = _inputs(context, node)
    x = inputs[0]
    count = inputs[1].val if len(inputs) > 1 and inputs[1] is not None else 1
    axis = inputs[2].val if len(inputs) > 2 and inputs[2] is not None else -1
    if count != 1 or axis not in (-1, x.rank - 1) or (len(inputs) > 4 and inputs[4] is not None):
        raise ExportError(f"{node.name}: diff of order {count} along axis {axis}, or with `append`, is not converted")
    if len(inputs) > 3 and inputs[3] is not None:
        x = mb.concat(values=[inputs[3], x], axis=-1)
    whole = [True] * (x.rank - 1)
    zeros = [0] * (x.rank - 1)
    later = mb.slice_by_index(x=x, begin=[*zeros, 1], end=[0] * x.rank, end_mask=[*whole, True])
    earlier = mb.slice_by_index(x=x, begin=[0] * x.rank, end=[*zeros, -1], end_mask=[*whole, False])
    context.add(mb.sub(x=later, y=earlier, name=node.name))


def _cast(context: Any, node: Any, dtype: type, dtype_name: str) -> None:
    """A value of one element as a Python scalar, or cast and squeezed when it depends on an input."""
    (x,) = ops._get_inputs(context, node, expected=1)
    if not all(size == 1 for size in x.shape):
        raise ValueError("input to cast must be either a scalar or a length 1 tensor")
    if x.can_be_folded_to_const():
        if isinstance(x.val, dtype):
            context.add(x, node.name)
        else:
            context.add(mb.const(val=dtype(np.asarray(x.val).item()), name=node.name), node.name)
        return
    if len(x.shape) > 0:
        x = mb.squeeze(x=x, name=f"{node.name}_item")
    context.add(mb.cast(x=x, dtype=dtype_name, name=node.name), node.name)
