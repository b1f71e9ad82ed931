"""Records of compressed weights as constants of an IR, laid out as NNCF's compress_weights does.

    u4|i4|u8|i8 [out, blocks, block] → Convert → (− zero) → × scale → Reshape [out, in]

A transposed record is stored like this as well, for the converter turns its constant (and drops its name, so that
it is found by its values). The converter multiplies the float weights of a convolution by the batch norm behind it, so
while it runs those weights are computed from their integers (`computed`), and the batch norm's factors stay beside
them. OpenVINO's plugins recognise this and keep it compressed, but for convolutions, which compute in floats. Scales
that are fp16 numbers are stored so and widened. Look-up tables have no such kernel on the CPU: a palettized
weight stays the float constant that it is (see mapping.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as opset
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mptrain.compress.weights.layers import CONVOLUTIONS
from mptrain.compress.weights.records import BlockQuantized, Record, distinct
from mptrain.core.errors import ExportError
from mptrain.export.openvino.recurrence import graphs_of

_WEIGHT = "self.model."  # what the converter puts before the name of a weight
_COMPUTED = ".parametrizations.weight.0.q"
_Shapes = dict[tuple[int, ...], ov.Node]


@contextmanager
def computed(model: nn.Module, records: Mapping[str, Record]) -> Iterator[None]:
    """Inside, weights of convolutions are computed from the integers of their records; a graph that is converted there
    is for `store`. Afterwards the model is as before."""
    held: list[tuple[nn.Module, nn.Parameter]] = []
    try:
        for name, record in records.items():
            module = model.get_submodule(name.rpartition(".")[0])
            if isinstance(module, CONVOLUTIONS) and isinstance(record, BlockQuantized):
                weight = model.get_parameter(name)
                parametrize.register_parametrization(module, "weight", _Integers(record, weight.shape), unsafe=True)
                held.append((module, weight))
        yield
    finally:
        for module, weight in held:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            module._parameters["weight"] = weight


class _Integers(nn.Module):
    q: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, record: BlockQuantized, shape: torch.Size) -> None:
        super().__init__()
        self.register_buffer("q", record.q.view(shape))
        self.register_buffer("scale", _shaped(record.scale, record, shape))
        self.register_buffer("zero", None if record.zero is None else _shaped(record.zero.float(), record, shape))

    def forward(self, _: Tensor) -> Tensor:
        value = self.q.to(torch.float32)
        return (value if self.zero is None else value - self.zero) * self.scale


def _shaped(values: Tensor, record: BlockQuantized, shape: torch.Size) -> Tensor:
    """[rows | 1, blocks] to what is multiplied with a weight of that shape."""
    if values.shape[1] == 1:
        return values.view(-1, *[1] * (len(shape) - 1))
    return values.repeat_interleave(record.block_size, 1).view(shape)


def store(graph: ov.Model, records: Mapping[str, Record]) -> None:
    """Replace what holds these weights, constants or what `computed` made of them, by their records; tied weights are
    stored once.

    Raises ExportError when the graph has no constant of a weight with the values of its record.
    """
    names = {id(record): {n for n, r in records.items() if r is record} for record in records.values()}
    loops = list(graphs_of(graph))
    constants: dict[str, list[ov.Node]] = {}
    shapes: dict[int, _Shapes] = {}  # by constant, those of its graph
    for inner in loops:
        here: _Shapes = {}
        for node in inner.get_ops():
            if node.get_type_name() == "Constant":
                constants.setdefault(node.get_friendly_name(), []).append(node)
                shapes[id(node)] = here
    for name, record in distinct(records).items():
        if not isinstance(record, BlockQuantized):
            continue
        places = list(_places(name, names[id(record)], record, constants))
        if not places:
            raise ExportError(_other_values(name))
        for constant, weight, label in places:
            stored = _decompressed(record, tuple(weight.get_output_shape(0)), label, shapes[id(constant)])
            for consumer in weight.output(0).get_target_inputs():
                consumer.replace_source_output(stored.output(0))
    for inner in loops:
        inner.validate_nodes_and_infer_types()


def _places(
    name: str, names: set[str], record: BlockQuantized, constants: Mapping[str, Sequence[ov.Node]]
) -> Iterator[tuple[ov.Node, ov.Node, str]]:
    """(constant, the node that gives the float weight, its new name) of each constant that holds the record's values.

    names: of the parameter, of which the graph may know any. Raises ExportError for one that has other values."""
    dense, q = record.dense().numpy(), record.q.numpy()
    if record.transposed:
        every = [node for nodes in constants.values() for node in nodes]
        yield from ((node, node, _WEIGHT + name) for node in every if _holds(node, dense))
        return
    for one in names:
        for node in constants.get(_WEIGHT + one, ()):
            if not np.array_equal(node.data.reshape(dense.shape), dense):
                raise ExportError(_other_values(name))
            yield node, node, _WEIGHT + one
        for node in constants.get(_WEIGHT + one.removesuffix(".weight") + _COMPUTED, ()):
            if not np.array_equal(node.data.reshape(q.shape), q):
                raise ExportError(_other_values(name))
            yield node, _multiplied(node), _WEIGHT + one


def _other_values(name: str) -> str:
    return (
        f"{name} has compressed values, but the converted graph has no constant that holds them, so they"
        " cannot be stored: report this with the model's config.json"
    )


def _multiplied(q: ov.Node) -> ov.Node:
    """The product with the scale, of integers that `computed` made: Convert, Subtract with a zero point, Multiply."""
    node = q
    while node.get_type_name() != "Multiply":
        (reader,) = node.output(0).get_target_inputs()
        node = reader.get_node()
    return node


def constants(graph: ov.Model) -> set[str]:
    """The names of the weights that are constants of the graph under their own names."""
    nodes = (node for inner in graphs_of(graph) for node in inner.get_ops() if node.get_type_name() == "Constant")
    names = (node.get_friendly_name() for node in nodes)
    return {name.removeprefix(_WEIGHT) for name in names if name.startswith(_WEIGHT)}


def _holds(node: ov.Node, values: np.ndarray) -> bool:
    return list(node.get_output_shape(0)) == list(values.shape) and np.array_equal(node.data, values)


def _decompressed(record: BlockQuantized, shape: tuple[int, ...], name: str, shapes: _Shapes) -> ov.Node:
    """A subgraph that computes record.dense() as float32 of `shape`. Scales and zero points have no names, and a shape
    is a constant once in a graph: of small layers the .xml is 3% of the file."""
    rows, columns = record.shape
    blocks = record.scale.shape[1]
    grouped = blocks > 1
    inner = [rows, blocks, columns // blocks] if grouped else list(shape)
    outer = [record.scale.shape[0], blocks, 1] if grouped else [record.scale.shape[0], *[1] * (len(shape) - 1)]
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
