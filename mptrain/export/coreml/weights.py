"""Learned integers and tables as Core ML's compressed constants: the same numbers, never computed again.

    BlockQuantized   iOS 18: constexpr_blockwise_shift_scale, 4 or 8 bits, any block, of convolutions of whole kernels
                     iOS 16 and 17: constexpr_affine_dequantize, 8 bits, per tensor or per row
    Palettized       iOS 18: constexpr_lut_to_dense, 1 to 8 bits, a table to each group of rows, scalar or vector
                     iOS 16 and 17: the same for one table to the tensor, scalar

Widths that Core ML lacks are stored in the next it has (3-bit integers as 4, 5-bit indices as
6). A table to each group needs groups of one size: a weight whose rows do not divide evenly is
stored as floats, and the export says so. A transposed record is stored transposed, and its blocks
and groups with it. iOS 15 would drop all compression: refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types
from torch import nn

from mptrain.compress.weights import records
from mptrain.compress.weights.records import BlockQuantized, Palettized, Record
from mptrain.core.errors import UserError

Constant = Callable[[str], Any]
_INDEX_BITS = (1, 2, 3, 4, 6, 8)  # iOS 16 and 17 have all but 3


def constants(
    model: nn.Module, source: Any, target: str, *, prefix: str = "model.", scaled_tables: bool = False
) -> tuple[dict[str, Constant], dict[str, str]]:
    """(what `coreml_compat.compatible` takes, {weight: why it is stored as floats}).

    source: the traced graph (TorchScript or ExportedProgram), in which the model's weights have `prefix`.
    scaled_tables: allow a scale to each row on top of tables, which crashes on some GPUs (coremltools#2688).
    Raises UserError for what the deployment target cannot hold.
    """
    found = records.of(model)
    if found and target == "iOS15":
        raise UserError(
            "minimum_deployment_target: iOS15 stores no compressed weights, Core ML would silently expand them;"
            " use iOS18 (int4 blocks, grouped tables), or iOS16 for int8 and tables per tensor"
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    made: dict[str, Constant] = {}
    floats: dict[str, str] = {}
    for name, record in found.items():
        build, reason = _build(name, record, shapes[name], target, scaled_tables)
        if reason:
            floats[name] = reason
            continue
        for graph_name in _graph_names(source, prefix + name):
            made[graph_name] = build
    return made, floats


def _graph_names(source: Any, name: str) -> list[str]:
    """torch.export lifts parameters to inputs with names of their own; a trace keeps the names."""
    signature = getattr(source, "graph_signature", None)
    if signature is None:
        return [name]
    return [lifted for lifted, parameter in signature.inputs_to_parameters.items() if parameter == name]


def _build(
    name: str, record: Record, shape: tuple[int, ...], target: str, scaled_tables: bool
) -> tuple[Constant, str | None]:
    if isinstance(record, BlockQuantized):
        if target == "iOS18":
            return partial(_blocks, record, shape), _uneven(record, shape)
        if record.bits > 4 and record.scale.shape[1] == 1:
            return partial(_rows, record, shape), None
        raise UserError(
            f"{name}: {record.bits}-bit integers with {record.scale.shape[1]} scales to a row need"
            f" minimum_deployment_target iOS18; {target} holds int8 with one scale to a row or to the tensor"
        )
    if record.per_channel_scale is not None and not scaled_tables:
        raise UserError(
            f"{name}: tables with a scale to each row crash on some GPUs (coremltools issue 2688); palettize without"
            " per_channel_scale, or set scaled_tables: true in the export to write them all the same"
        )
    if record.per_channel_scale is not None and record.cluster_dim > 1:
        raise UserError(
            f"{name}: coremltools writes no tables of vectors with a scale to each row (its pass"
            " canonicalize_quantized_lut_pattern drops the axis of the vectors); palettize with cluster_dim 1 or"
            " without per_channel_scale"
        )
    if target == "iOS18":
        rows = record.shape[0]
        uneven = f"{rows} rows are not a multiple of its groups of {record.rows_per_group}"
        return partial(_tables, record, shape), uneven if rows % min(record.rows_per_group, rows) else None
    if record.lut.shape[0] == 1 and record.cluster_dim == 1 and record.bits != 3 and record.per_channel_scale is None:
        return partial(_one_table, record, shape), None
    raise UserError(
        f"{name}: {record.lut.shape[0]} tables of {record.bits} bits (vectors of {record.cluster_dim}) need"
        f" minimum_deployment_target iOS18; {target} holds one table of 1, 2, 4, 6 or 8 bits to a tensor"
    )


def _uneven(record: BlockQuantized, shape: tuple[int, ...]) -> str | None:
    """Columns of a convolution go through channels and kernel; blocks of Core ML are of whole channels."""
    kernel = math.prod(shape[2:])
    if record.scale.shape[1] > 1 and record.block_size % kernel:
        return f"blocks of {record.block_size} columns do not hold whole kernels of {kernel}"
    return None


def _blocks(record: BlockQuantized, shape: tuple[int, ...], name: str) -> Any:
    kind = "uint" if record.q.dtype == torch.uint8 else "int"
    dtype = _numpy(f"{kind}{4 if record.bits <= 4 else 8}")
    scale = _turned(record.scale.numpy(), record)
    scale = scale.reshape(*scale.shape, *[1] * (len(shape) - 2))
    offset = None if record.zero is None else _turned(record.zero.numpy(), record).astype(dtype).reshape(scale.shape)
    data = _turned(record.q.numpy(), record).astype(dtype).reshape(shape)
    return mb.constexpr_blockwise_shift_scale(data=data, scale=scale, offset=offset, name=name)


def _rows(record: BlockQuantized, shape: tuple[int, ...], name: str) -> Any:
    q = _turned(record.q.numpy(), record).reshape(shape)
    scale = record.scale.numpy().reshape(-1)
    zero = np.zeros_like(scale, dtype=q.dtype) if record.zero is None else record.zero.numpy().reshape(-1)
    if scale.size == 1:
        scale, zero = scale[0], zero[0]
    axis = np.int32(record.transposed)
    return mb.constexpr_affine_dequantize(quantized_data=q, zero_point=zero, scale=scale, axis=axis, name=name)


def _tables(record: Palettized, shape: tuple[int, ...], name: str) -> Any:
    bits = next(b for b in _INDEX_BITS if b >= record.bits)
    groups = [1] * len(shape)
    groups[int(record.transposed)] = -1
    lut = record.lut.numpy()
    if bits != record.bits:
        lut = np.concatenate([lut, np.zeros((len(lut), 2**bits - lut.shape[1], lut.shape[2]), lut.dtype)], axis=1)
    lut = lut.reshape(*groups, *lut.shape[1:])
    vector: dict[str, Any] = {}
    index_shape = list(shape)
    if record.cluster_dim > 1:
        axis = 0 if record.transposed else len(shape) - 1
        index_shape[axis] //= record.cluster_dim
        vector = {"vector_axis": np.int32(axis)}
    indices = _turned(record.indices.numpy(), record).astype(_numpy(f"uint{bits}")).reshape(index_shape)
    scale = record.per_channel_scale
    table_name = name if scale is None else f"{name}_table"
    dense = mb.constexpr_lut_to_dense(indices=indices, lut=lut, name=table_name, **vector)
    if scale is None:
        return dense
    return mb.constexpr_blockwise_shift_scale(data=dense, scale=scale.numpy().reshape(groups), name=name)


def _one_table(record: Palettized, shape: tuple[int, ...], name: str) -> Any:
    """Before iOS 18: indices packed into bytes, least significant bits first, in a flat array."""
    bits = next(b for b in _INDEX_BITS if b >= record.bits and b != 3)
    lut = np.zeros(2**bits, np.float32)
    lut[: 2**record.bits] = record.lut.numpy().reshape(-1)
    flat = _turned(record.indices.numpy(), record).reshape(-1, 1)
    packed = np.packbits((flat >> np.arange(bits, dtype=np.uint8)) & 1, bitorder="little")
    return mb.constexpr_lut_to_dense(indices=packed, lut=lut, shape=np.array(shape, np.uint32), name=name)


def _turned(values: np.ndarray, record: Record) -> np.ndarray:
    """[rows, columns] as the parameter has them."""
    return np.ascontiguousarray(values.T) if record.transposed else values


def _numpy(name: str) -> Any:
    return types.nptype_from_builtin(types.string_to_builtin(name))
