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
_Shapes = dict[tuple[int, ...], ov.Node]


def store(graph: ov.Model, records: Mapping[str, Record]) -> None:
    """Replace the constants of these weights by their records; tied weights are stored once.

    Raises ExportError when the graph has no constant of a weight with the values of its record.
    """
    names = {id(record): {n for n, r in records.items() if r is record} for record in records.values()}
    loops = list(graphs_of(graph))
    constants: dict[str, ov.Node] = {}
    shapes: dict[str, _Shapes] = {}  # by constant, those of its graph
    for inner in loops:
        own = {node.get_friendly_name(): node for node in inner.get_ops() if node.get_type_name() == "Constant"}
        constants |= own
        here: _Shapes = {}
        shapes |= dict.fromkeys(own, here)
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
            known = shapes[node.get_friendly_name()]
            stored = _decompressed(record, tuple(node.get_output_shape(0)), label, known)
            for consumer in node.output(0).get_target_inputs():
                consumer.replace_source_output(stored.output(0))
    for inner in loops:
        inner.validate_nodes_and_infer_types()


def _holds(node: ov.Node, values: np.ndarray) -> bool:
    return list(node.get_output_shape(0)) == list(values.shape) and np.array_equal(node.data, values)


def _decompressed(record: BlockQuantized, shape: tuple[int, ...], name: str, shapes: _Shapes) -> ov.Node:
    """A subgraph that computes record.dense() as float32 of `shape`. Scales and zero points have no names, and a shape
    is a constant once in a graph: of small layers the .xml is 3% of the file."""
    rows, columns = record.shape
    blocks = record.scale.shape[1]
    grouped = blocks > 1
    inner = [rows, blocks, columns // blocks] if grouped else [rows, columns]
    outer = [record.scale.shape[0], blocks, 1] if grouped else [record.scale.shape[0], 1]
    value = opset.convert(_integers(record.q, record.bits, inner, name), "f32")
    if record.zero is not None:
        zero = _integers(record.zero, record.bits, outer)
        value = opset.subtract(value, opset.convert(zero, "f32"))
    value = opset.multiply(value, _scale(record.scale, outer), name=f"{name}/fq_weights_1")
    if inner != list(shape):
        if shape not in shapes:
            shapes[shape] = opset.constant(np.array(shape, dtype=np.int64))
        value = opset.reshape(value, shapes[shape], special_zero=False)
    return value


def _scale(scale: Tensor, shape: list[int]) -> ov.Node:
    values = scale.numpy().reshape(shape)
    if not np.array_equal(values.astype(np.float16).astype(np.float32), values):
        return opset.constant(values)
    return opset.convert(opset.constant(values.astype(np.float16)), "f32")


def _integers(values: Tensor, bits: int, shape: list[int], name: str | None = None) -> ov.Node:
    """A constant of 4 or 8 bits; other widths are stored in the next one of these."""
    array = values.numpy().reshape(shape)
    if bits > 4:
        return opset.constant(array, name=name)
    return opset.constant(array, dtype=ov.Type.i4 if array.dtype == np.int8 else ov.Type.u4, name=name)
