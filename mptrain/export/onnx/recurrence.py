"""Recurrences of a model (`core.recurrence`) as Loops.

export    mptrain::Recurrence(x, state) in place of the steps, an operation that no runtime knows
lower     Loop: as many rounds as x has steps; a round takes its x, [batch, features], hands the state on, and
          leaves it among those that are put together
body      the cell, exported by itself; its weights are those of the graph around it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
import torch
from torch import Tensor, nn

from mptrain.core.errors import ExportError
from mptrain.core.recurrence import Step, recurrences
from mptrain.export.onnx.facts import SCOPES, module

DOMAIN, _KIND = "mptrain", "Recurrence"


def stand_in(x: Tensor, state: Tensor, number: int) -> Tensor:
    shape = (x.shape[0], x.shape[1], state.shape[1])
    kind = f"{DOMAIN}::{_KIND}"
    return torch.onnx.ops.symbolic(kind, (x, state), {"number": number}, dtype=x.dtype, shape=shape, version=1)


def check_half(model: nn.Module) -> None:
    """Raises ExportError for a model with a recurrence: what casts a graph to half does not go into its loops."""
    if names := list(recurrences(model)):
        raise ExportError(
            f"ONNX export: fp16 of a model with a Recurrence ({', '.join(names)}) is not supported, for its loops stay"
            " float32. Export it as fp32, or with int8 weights (a stage with quantize mode weight_only)"
        )


def lower(model: ir.Model, steps: Sequence[Step], convert: Callable[[Step], ir.Model]) -> None:
    """In place. steps: as `replaced` gives them. convert: a cell by itself, (x_t, state) to the state."""
    nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type == _KIND]
    for index, node in enumerate(nodes):
        step = steps[node.attributes["number"].as_int()]
        _Lowered(model.graph, node, step, f"{step.name}.cell_{index}").insert(convert(step).graph)
    model.opset_imports.pop(DOMAIN, None)


class _Lowered:
    """One of the operations. label: of everything new, for names are unique in a file, bodies included."""

    def __init__(self, graph: ir.Graph, node: ir.Node, step: Step, label: str) -> None:
        self.graph, self.node, self.step, self.label = graph, node, step, label
        self._count = 0

    def insert(self, cell: ir.Graph) -> None:
        x, state = self.node.inputs
        (states,) = self.node.outputs
        ordered, places = self._made("Transpose", [x], perm=[1, 0, 2]), self._made("Shape", [x], start=1, end=2)
        rounds = self._made("Squeeze", [places.outputs[0]])
        body = self._body(cell, ordered.outputs[0])
        loop = self._made("Loop", [rounds.outputs[0], None, state], 2, body=body)
        turned = self._made("Transpose", [loop.outputs[1]], perm=[1, 0, 2])
        self.graph.insert_before(self.node, [ordered, places, rounds, loop, turned])
        (made,) = turned.outputs
        made.name, made.type, made.shape = states.name, states.type, states.shape
        states.replace_all_uses_with(made, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)

    def _body(self, cell: ir.Graph, x: ir.Value) -> ir.Graph:
        """cell: is taken apart. x: [steps, batch, features], of the graph around it."""
        size = ir.Shape([None, self.step.size])
        number = ir.Value(name=f"{self.label}/round", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
        goes_on = ir.Value(name=f"{self.label}/goes_on", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
        before = ir.Value(name=f"{self.label}/state", shape=size, type=ir.TensorType(ir.DataType.FLOAT))
        taken = self._made("Gather", [x, number], axis=0)
        for old, new in zip(list(cell.inputs), (taken.outputs[0], before), strict=True):
            old.replace_all_uses_with(new)
        (after,) = cell.outputs
        nodes = list(cell)
        cell.inputs.clear()
        cell.outputs.clear()
        for name, value in list(cell.initializers.items()):
            del cell.initializers[name]
            value.name = f"{self.label}/{name}"
            self.graph.register_initializer(value)
        cell.remove(nodes)
        for node in nodes:
            self._named(node)
        still, left = self._made("Identity", [goes_on]), self._made("Identity", [after])
        inputs, outputs = [number, goes_on, before], [still.outputs[0], after, left.outputs[0]]
        return ir.Graph(inputs, outputs, nodes=[taken, *nodes, still, left], name=f"{self.label}/body")

    def _named(self, node: ir.Node) -> None:
        """As what it is in the whole model."""
        if SCOPES in node.metadata_props:
            inside = module(node)
            node.metadata_props[SCOPES] = f"['', 'model', '{self.step.name}.cell.{inside}', '{node.name}']"
        node.name = f"{self.label}/{node.name}"
        for value in node.outputs:
            value.name = f"{self.label}/{value.name}"

    def _made(self, kind: str, inputs: Sequence[ir.Value | None], outputs: int = 1, **attributes: object) -> ir.Node:
        self._count += 1
        name = f"{self.label}/{kind}_{self._count}"
        node = ir.node(kind, inputs, attributes=attributes, num_outputs=outputs, name=name)  # type: ignore[arg-type]
        for place, value in enumerate(node.outputs):
            value.name = f"{name}_{place}"
        return node
