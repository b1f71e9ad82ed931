"""Records of compressed weights as integers of an ONNX file, never computed again.

    x · W, weight only    MatMulNBits of onnxruntime: 4 or 8 bits in blocks of 16 to 128, activations stay float (it
                          would make the same of a DequantizeLinear, with activations in 8 bits and without a word)
    look-up of rows       Gather of the integers, of their scales and zero points, then their product
    everything else       DequantizeLinear on int4, uint4, int8 or uint8, per tensor, row or block; with
                          QuantizeLinear and DequantizeLinear before the layer onnxruntime computes in integers

MatMulNBits knows blocks of powers of two: a longer block, or a whole row, is written as several with one scale.
Other widths are stored in the next of 4 and 8 bits. Palettized weights stay the floats that they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from mptrain.compress.weights.records import BlockQuantized, Record, distinct
from mptrain.core.errors import ExportError

BLOCKS = (128, 64, 32, 16)
MICROSOFT = "com.microsoft"
MOVES = {"Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Gather", "Flatten", "Expand"}


def store(model: ir.Model, records: Mapping[str, Record]) -> set[str]:
    """Replace the constants of these weights by their records; tied weights are stored once.

    They are found by their values, for the exporter drops names where it turns a constant. Returns the names of the
    records that the graph has a constant of.
    """
    graph, done = model.graph, set()
    for name, record in distinct(records).items():
        if not isinstance(record, BlockQuantized):
            continue
        dense = record.dense().numpy()
        found = [
            (value, turned)
            for value in list(graph.initializers.values())
            if (turned := _turned(value, dense)) is not None
        ]
        stored = _Stored(model, name, record)
        for value, turned in found:
            for use in list(value.uses()):
                stored.use(use.node, use.idx, value, turned)
            assert value.name is not None
            del graph.initializers[value.name]
        done |= {name} if found else set()
    return done


def check_stored(records: Mapping[str, Record], stored: Collection[str]) -> None:
    """Raises ExportError for a record that no graph has a constant of."""
    lost = [n for n, record in distinct(records).items() if isinstance(record, BlockQuantized) and n not in stored]
    if lost:
        raise ExportError(
            f"{', '.join(lost)}: compressed, but the converted graph has no constant with these values, so they"
            " cannot be stored: report this with the model's config.json"
        )


def _turned(value: ir.Value, dense: np.ndarray) -> bool | None:
    """Whether a constant is the weight [out, in, …] or, turned, its transpose; None: neither."""
    tensor = value.const_value
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size != dense.size:
        return None
    array = tensor.numpy()
    if array.shape[:1] == dense.shape[:1] and np.array_equal(array.reshape(dense.shape), dense):
        return False
    return True if array.shape == dense.T.shape and np.array_equal(array, dense.T) else None


class _Stored:
    """One record in a graph, in the layouts that its readers need, each once."""

    def __init__(self, model: ir.Model, name: str, record: BlockQuantized) -> None:
        self.model, self.graph, self.name, self.record = model, model.graph, name, record
        self.q, self.scale = record.q.numpy(), record.scale.numpy()
        self.zero = None if record.zero is None else record.zero.numpy()
        self.made: dict[str, ir.Value] = {}

    def use(self, node: ir.Node, place: int, value: ir.Value, turned: bool) -> None:
        if node.op_type == "Transpose" and not turned:  # a tied head: the table is turned where it is read
            readers = [use.node for use in node.outputs[0].uses()]
            if readers and all(self._multiplies(reader, node.outputs[0]) for reader in readers):
                for reader in readers:
                    self._matmul(reader)
                _graph(node).remove(node, safe=True)
                return
        if place == 1 and turned != _turns(node) and self._multiplies(node, value):
            self._matmul(node)
        elif node.op_type == "Gather" and place == 0 and not turned and self.scale.shape == (len(self.q), 1):
            self._gather(node)
        else:
            node.replace_input_with(place, self._dequantized(value, turned))

    def _multiplies(self, node: ir.Node, weight: ir.Value) -> bool:
        """Whether a node is x · weight with x in floating point, in blocks that MatMulNBits knows."""
        plain = all(node.attributes[name].as_float() == 1 for name in ("alpha", "beta") if name in node.attributes)
        if (
            node.op_type not in ("MatMul", "Gemm")
            or not plain
            or node.inputs[1] is not weight
            or node.inputs[0] is None
        ):
            return False
        return not _quantized(node.inputs[0]) and self._block() is not None

    def _block(self) -> int | None:
        return next((block for block in BLOCKS if self.record.block_size % block == 0), None)

    def _matmul(self, node: ir.Node) -> None:
        block, bits = self._block(), 4 if self.record.bits <= 4 else 8
        assert block is not None
        rows, columns = self.q.shape
        count = columns // block
        repeats = count // self.scale.shape[1]
        scale = np.repeat(np.broadcast_to(self.scale, (rows, self.scale.shape[1])), repeats, axis=1)
        middle = 2 ** (bits - 1)
        q = self.q.astype(np.int16) + (middle if self.q.dtype == np.int8 else 0)
        packed = self._constant("packed", _packed(q.astype(np.uint8), bits).reshape(rows, count, block * bits // 8))
        inputs = [node.inputs[0], packed, self._constant("scales", scale.astype(np.float32))]
        if self.zero is not None:
            zero = np.repeat(np.broadcast_to(self.zero, (rows, self.zero.shape[1])), repeats, axis=1)
            inputs.append(self._constant("zero_points", _packed(zero.astype(np.uint8), bits)))
        attributes = {"K": columns, "N": rows, "bits": bits, "block_size": block}
        self.model.opset_imports[MICROSOFT] = 1
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is None:
            self._replace(node, ir.node("MatMulNBits", inputs, attributes=attributes, domain=MICROSOFT, name=node.name))
            return
        product = ir.node("MatMulNBits", inputs, attributes=attributes, domain=MICROSOFT, name=f"{node.name}_product")
        product.metadata_props.update(node.metadata_props)
        _graph(node).insert_before(node, product)
        made = self._typed(product, ir.DataType.FLOAT, f"{node.name}_product")
        self._replace(node, ir.node("Add", [made, bias], name=node.name))

    def _gather(self, node: ir.Node) -> None:
        bits = 8  # a look-up of single rows in packed integers has no operation
        indices = node.inputs[1]
        dtype = np.int8 if self.q.dtype == np.int8 else np.uint8
        parts = [("rows", self.q.astype(dtype)), ("row_scales", self.scale)]
        parts += [] if self.zero is None else [("row_zero_points", self.zero.astype(dtype))]
        found = []
        for label, array in parts:
            look = ir.node("Gather", [self._constant(f"{label}_{bits}", array), indices], name=f"{node.name}_{label}")
            _graph(node).insert_before(node, look)
            found.append(self._typed(look, ir.DataType.from_numpy(array.dtype), f"{node.name}_{label}"))
        q, scale, *zero = found
        value = self._float(node, q, "q")
        if zero:
            moved = ir.node("Sub", [value, self._float(node, zero[0], "z")], name=f"{node.name}_moved")
            _graph(node).insert_before(node, moved)
            value = self._typed(moved, ir.DataType.FLOAT, f"{node.name}_moved")
        self._replace(node, ir.node("Mul", [value, scale], name=node.name))

    def _float(self, node: ir.Node, value: ir.Value, label: str) -> ir.Value:
        made = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{node.name}_{label}_float")
        _graph(node).insert_before(node, made)
        return self._typed(made, ir.DataType.FLOAT, f"{node.name}_{label}_float")

    def _dequantized(self, value: ir.Value, turned: bool) -> ir.Value:
        """The weight in the layout of the constant that it stands for."""
        assert value.const_value is not None
        shape = value.const_value.numpy().shape
        key = f"{value.name}_dequantized"
        if key in self.made:
            return self.made[key]
        blocked = self.scale.shape[1] > 1
        matrix = len(shape) == 2 or blocked
        q = self.q.T if turned else self.q if matrix else self.q.reshape(shape)
        per_row = self.scale.shape[0] > 1 or blocked
        attributes: dict[str, int] = {}
        if blocked:
            attributes = {"axis": 0 if turned else 1, "block_size": self.record.block_size}
        elif per_row:
            attributes = {"axis": 1 if turned else 0}

        def laid(array: np.ndarray) -> np.ndarray:
            if not per_row:
                return array.reshape(())
            if not blocked:
                return array.reshape(-1)
            array = np.broadcast_to(array, (len(self.q), array.shape[1]))
            return array.T if turned else array

        side = "turned" if turned else "rows"
        inputs = [self._constant(f"q_{side}", self._narrow(q)), self._constant(f"scale_{side}", laid(self.scale))]
        if self.zero is not None:
            inputs.append(self._constant(f"zero_{side}", self._narrow(laid(self.zero))))
        node = ir.node("DequantizeLinear", inputs, attributes=attributes, name=f"dequantize_{value.name}")
        self.graph.insert_before(self.graph[0], node)
        made = self._typed(node, ir.DataType.FLOAT, key)
        if matrix and shape != q.shape:
            sizes = self._constant(f"shape_{side}", np.array(shape, dtype=np.int64))
            reshape = ir.node("Reshape", [made, sizes], name=f"reshape_{value.name}")
            self.graph.insert_after(node, reshape)
            made = self._typed(reshape, ir.DataType.FLOAT, f"{key}_shaped")
        self.made[key] = made
        return made

    def _narrow(self, array: np.ndarray) -> np.ndarray:
        if self.record.bits > 4:
            return array
        return array.astype(ml_dtypes.int4 if array.dtype == np.int8 else ml_dtypes.uint4)

    def _constant(self, label: str, array: np.ndarray) -> ir.Value:
        if label not in self.made:
            name = f"{self.name}_{label}"
            tensor = ir.tensor(np.ascontiguousarray(array), name=name)
            value = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self.graph.register_initializer(value)
            self.made[label] = value
        return self.made[label]

    @staticmethod
    def _typed(node: ir.Node, dtype: ir.DataType, name: str) -> ir.Value:
        (output,) = node.outputs
        output.name, output.type = name, ir.TensorType(dtype)
        return output

    def _replace(self, old: ir.Node, new: ir.Node) -> None:
        """The new node in the place of the old one, under the name and with the readers of its output."""
        (was,), (now,) = old.outputs, new.outputs
        now.name, now.type, now.shape = was.name, was.type, was.shape
        new.metadata_props.update(old.metadata_props)
        graph = _graph(old)
        graph.insert_before(old, new)
        for use in list(was.uses()):
            use.node.replace_input_with(use.idx, now)
        for place, output in enumerate(graph.outputs):
            if output is was:
                graph.outputs[place] = now
        graph.remove(old, safe=True)


def _graph(node: ir.Node) -> ir.Graph:
    """That it is in, the body of a loop as well."""
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _quantized(value: ir.Value | None) -> bool:
    """Whether an activation has been through a quantizer, also where it was moved since."""
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type == "DequantizeLinear":
            return True
        if producer.op_type not in MOVES:
            return False
        value = producer.inputs[0]
    return False


def _turns(node: ir.Node) -> bool:
    """Whether an operation turns its second operand itself."""
    return node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() == 1


def _packed(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [rows, columns] in as few bytes, low half first; rows of odd length get a zero."""
    if bits == 8:
        return values
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    return values[:, ::2] | (values[:, 1::2] << 4)
