"""Products that fp16 would break, computed in it with the channels scaled by powers of two.

A product x·W + c stays in float32 because some channels of x or of its result pass 65504, and its weights with it. With
integers a for the channels of x and b for those of the result

    y = ((x · 2^-a) · (2^a · W · 2^-b) + 2^-b · c) · 2^b

is exact but for rounding, and everything up to the last factor fits fp16: only x · 2^-a and the last factor are
float32 (channels evened out as in SmoothQuant, arXiv 2211.10438, for range in place of step). a and b are the least
that put the largest |x| and |y| of calibration at 512, 128 times below the limit. Weights that fp16 would then round
by more than one part in 500, as the calibration weighs them, stay float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from mptrain.verify.ranges import HALF_MAX

FLOAT = ir.DataType.FLOAT
FITS = 512.0
ROUNDED = 2e-3
Reach = tuple[np.ndarray, np.ndarray]
"""largest magnitudes of the channels of a product's input [K] and of its result [N]"""


def fit(
    graph: ir.Graph, products: Iterable[tuple[ir.Node, Reach]]
) -> tuple[dict[ir.Node, ir.DataType | None], set[ir.Node]]:
    """Change the products of a float32 graph that can be: ({node: what it computes in}, None: as its input is; those
    whose results are float32).

    products: nodes, of which those count that are MatMul or Gemm with constant weights.
    """
    types: dict[ir.Node, ir.DataType | None] = {}
    large = set()
    for node, reach in products:
        made = _fit(graph, node, reach)
        types |= made
        if FLOAT in made.values():
            large.add(node)
    return types, large


def _weights(node: ir.Node) -> np.ndarray | None:
    """[K, N], where a node is a product with constant weights."""
    if node.op_type not in ("MatMul", "Gemm") or len(node.inputs) < 2 or node.inputs[1] is None:
        return None
    constant = node.inputs[1].const_value
    plain = _number(node, "alpha", 1.0) == _number(node, "beta", 1.0) == 1 and not _number(node, "transA", 0)
    if constant is None or len(constant.shape) != 2 or not plain:
        return None
    array = constant.numpy()
    return array.T if _number(node, "transB", 0) else array


def _number(node: ir.Node, name: str, default: float) -> float:
    return node.attributes[name].value if name in node.attributes else default


def _fit(graph: ir.Graph, node: ir.Node, reach: Reach) -> dict[ir.Node, ir.DataType | None]:
    weights = _weights(node)
    if weights is None:
        return {}
    added, place, constant = _added(node, weights.shape[1])
    last = added or node
    (result,) = last.outputs
    largest = reach[1] if constant is None else reach[1] + np.abs(constant)
    a, b = _exponents(reach[0]), _exponents(largest)
    foreign = node.op_type == "Gemm" and len(node.inputs) > 2 and constant is None
    if b.any() and (foreign or result.is_graph_output()):
        return {}
    scaled = np.ldexp(weights, a[:, None] - b).astype(np.float32)
    if not _fits(scaled, np.ldexp(reach[0], -a)):
        return {}
    stored = scaled.T if _number(node, "transB", 0) else scaled
    node.replace_input_with(1, _constant(graph, f"{result.name}_weights", np.ascontiguousarray(stored)))
    if constant is not None and b.any():
        last.replace_input_with(place, _constant(graph, f"{result.name}_added", np.ldexp(constant, -b)))
    types: dict[ir.Node, ir.DataType | None] = {node: ir.DataType.FLOAT16, last: ir.DataType.FLOAT16}
    given = node.inputs[0]
    if a.any():
        assert given is not None
        before = _times(graph, given, np.ldexp(np.float32(1), -a), f"{result.name}_down")
        graph.insert_before(node, before)
        node.replace_input_with(0, before.outputs[0])
        types[before] = None
    if b.any():
        uses = list(result.uses())
        after = _times(graph, result, np.ldexp(np.float32(1), b), f"{result.name}_up")
        graph.insert_after(last, after)
        for user, index in uses:
            user.replace_input_with(index, after.outputs[0])
        types[after] = FLOAT
    return types


def _exponents(largest: np.ndarray) -> np.ndarray:
    return np.ceil(np.log2(np.maximum(largest / FITS, 1.0))).astype(np.int32)


def _fits(scaled: np.ndarray, inputs: np.ndarray) -> bool:
    """Whether fp16 holds the weights, each column weighed by the inputs that it meets."""
    if np.abs(scaled).max(initial=0) > HALF_MAX:
        return False
    off = np.linalg.norm((scaled.astype(np.float16) - scaled) * inputs[:, None], axis=0)
    return bool((off <= ROUNDED * np.linalg.norm(scaled * inputs[:, None], axis=0)).all())


def _added(node: ir.Node, width: int) -> tuple[ir.Node | None, int, np.ndarray | None]:
    """(the Add of a constant that alone reads the product, the place of the constant, it); a Gemm has its own."""
    if node.op_type == "Gemm":
        own = node.inputs[2] if len(node.inputs) > 2 else None
        array = None if own is None or own.const_value is None else own.const_value.numpy()
        return None, 2, array if array is not None and array.shape == (width,) else None
    uses = list(node.outputs[0].uses())
    if len(uses) == 1 and not node.outputs[0].is_graph_output() and uses[0][0].op_type == "Add":
        user, index = uses[0]
        other = user.inputs[1 - index]
        if other is not None and other.const_value is not None and other.const_value.numpy().shape == (width,):
            return user, 1 - index, other.const_value.numpy()
    return None, 1, None


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    array = array.astype(np.float32)
    made = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(FLOAT), const_value=ir.tensor(array, name=name)
    )
    graph.register_initializer(made)
    return made


def _times(graph: ir.Graph, value: ir.Value, factors: Any, name: str) -> ir.Node:
    node = ir.node("Mul", [value, _constant(graph, f"{name}_factors", factors)], name=name)
    (made,) = node.outputs
    made.name, made.shape, made.type = name, value.shape, ir.TensorType(FLOAT)
    return node


def reaching(found: Iterable[Mapping[str, tuple[Tensor, Tensor]]]) -> dict[str, Reach]:
    """Of several batches together."""
    total: dict[str, Reach] = {}
    for batch in found:
        for name, (given, made) in batch.items():
            reach = (given.numpy(), made.numpy())
            known = total.get(name, reach)
            total[name] = (np.maximum(known[0], reach[0]), np.maximum(known[1], reach[1]))
    return total
