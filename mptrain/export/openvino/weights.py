"""Records of compressed weights as constants of an IR, laid out as NNCF's compress_weights does.

    u4|i4|u8|i8 [out, blocks, block] → Convert → (− zero) → × scale → Reshape [out, in]

A transposed record is stored like this as well, for the converter turns its constant (and drops its name, so that
it is found by its values). OpenVINO's plugins recognise this and keep it compressed. Scales that are fp16 numbers are
stored so and widened. Look-up tables have no such kernel on the CPU: a palettized
weight stays the float constant that it is (see mapping.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import openvino as ov
from openvino import opset13 as opset
from torch import Tensor

from mptrain.compress.weights.records import BlockQuantized, Record, distinct
from mptrain.core.errors import ExportError
from mptrain.export.openvino.recurrence import graphs_of

_WEIGHT = "self.model."  # what the converter puts before the name of a weight


def store(graph: ov.Model, records: Mapping[str, Record]) -> None:
    """Replace the constants of these weights by their records; tied weights are stored once.

    Raises ExportError when the graph has no constant of a weight with the values of its record.
    """
    names = {id(record): {n for n, r in records.items() if r is record} for record in records.values()}
    loops = list(graphs_of(graph))
    constants = {n.get_friendly_name(): n for g in loops for n in g.get_ops() if n.get_type_name() == "Constant"}
    for name, record in distinct(records).items():
        if not isinstance(record, BlockQuantized):
            continue
        dense = record.dense().numpy()
        if record.transposed:
            found = [node for node in constants.values() if _holds(node, dense)]
        else:
            found = [constants[_WEIGHT + n] for n in names[id(record)] if _WEIGHT + n in constants]
        if not found or not all(np.array_equal(node.data.reshape(dense.shape), dense) for node in found):
            raise ExportError(
                f"{name} has compressed values, but the converted graph has no constant that holds them, so they"
                " cannot be stored: report this with the model's config.json"
            )
        for node in found:
            label = _WEIGHT + name if record.transposed else node.get_friendly_name()
            stored = _decompressed(record, list(node.get_output_shape(0)), label)
            for consumer in node.output(0).get_target_inputs():
                consumer.replace_source_output(stored.output(0))
    for inner in loops:
        inner.validate_nodes_and_infer_types()


def _holds(node: ov.Node, values: np.ndarray) -> bool:
    return list(node.get_output_shape(0)) == list(values.shape) and np.array_equal(node.data, values)


def _decompressed(record: BlockQuantized, shape: list[int], name: str) -> ov.Node:
    """A subgraph that computes record.dense() as float32 of `shape`."""
    rows, columns = record.shape
    blocks = record.scale.shape[1]
    grouped = blocks > 1
    inner = [rows, blocks, columns // blocks] if grouped else [rows, columns]
    outer = [record.scale.shape[0], blocks, 1] if grouped else [record.scale.shape[0], 1]
    value = opset.convert(_integers(record.q, record.bits, inner, name), "f32")
    if record.zero is not None:
        zero = _integers(record.zero, record.bits, outer, f"{name}/zero_point")
        value = opset.subtract(value, opset.convert(zero, "f32"))
    value = opset.multiply(value, _scale(record.scale, outer, f"{name}/scale"), name=f"{name}/fq_weights_1")
    if inner != shape:
        value = opset.reshape(value, np.array(shape, dtype=np.int64), special_zero=False)
    return value


def _scale(scale: Tensor, shape: list[int], name: str) -> ov.Node:
    values = scale.numpy().reshape(shape)
    if not np.array_equal(values.astype(np.float16).astype(np.float32), values):
        return opset.constant(values, name=name)
    return opset.convert(opset.constant(values.astype(np.float16), name=name), "f32")


def _integers(values: Tensor, bits: int, shape: list[int], name: str) -> ov.Node:
    """A constant of 4 or 8 bits; other widths are stored in the next one of these."""
    array = values.numpy().reshape(shape)
    if bits > 4:
        return opset.constant(array, name=name)
    return opset.constant(array, dtype=ov.Type.i4 if array.dtype == np.int8 else ov.Type.u4, name=name)
