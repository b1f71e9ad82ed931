"""A float32 ONNX graph in fp16, with the fewest casts around what fp16 would break.

    find     on the torch graph that the ONNX nodes name, which operations must stay in float32
    cast     every floating value gets one type: float32 where an operation that stays makes it, float16 elsewhere.
             A value that is read in the other type is cast once, where it is made; views follow what they show;
             constants are stored in the type (or the types) that they are read in
    fit      what stays and is a product with weights is computed in float16 with its channels scaled, where that is
             exact enough (mptrain.export.onnx.scaled): its weights take half the room

So there are as many casts as there are values that cross, not two around each operation. Inputs and outputs stay
float32, but for keys and values of a cache: they are float16 where none of them is made by an operation that stays.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor
from torch.export import ExportedProgram

from mptrain.core.errors import ExportError
from mptrain.export.onnx import scaled
from mptrain.export.onnx.facts import NODE
from mptrain.export.onnx.parts import Part
from mptrain.export.torch.decoding import PAST, PRESENT
from mptrain.verify import overflow
from mptrain.verify.programs import exported
from mptrain.verify.ranges import HALF_LEAST, HALF_MAX

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
INFINITE = 1e38
"""numbers from here on mean infinity, and become 65504"""
STAYS: Mapping[str, Collection[int]] = {"Resize": (1, 2), "Upsample": (1,)}
"""operands that are float32 whatever the operation computes in"""


def find(
    program: ExportedProgram, part: Part, batches: Sequence[Mapping[str, Tensor]]
) -> tuple[dict[str, Any], dict[str, scaled.Reach]]:
    """(JSON facts, how far the channels of products reach that stay in float32). kept_fp32 of the facts has the names
    of nodes of the torch graph, each with its reason. batches: of the model."""
    calls, ports = [part.call(batch) for batch in batches], part.ports
    ops = exported.GraphOps(program, ports.input_names, ports.output_names, calls, part.counts)
    found = overflow.described(overflow.search(ops, reference=[part.expected(batch) for batch in batches]))
    kept = found["kept_fp32"]
    return found, scaled.reaching(ops.channels(batch, kept) for batch in range(len(calls)) if kept)


def together(found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Of the files of a model, by name: the facts of all, an operation with the name of its file before it."""
    if len(found) == 1:
        return next(iter(found.values()))
    facts = list(found.values())
    kept = {f"{file}: {op}": why for file, half in found.items() for op, why in half["kept_fp32"].items()}
    return {
        "kept_fp32": kept,
        **{name: _worst([half[name] for half in facts]) for name in ("all_half", "kept")},
        **{name: sum(half[name] for half in facts) for name in ("casts", "runs", "seconds")},
        "scaled": [f"{file}: {op}" for file, half in found.items() for op in half["scaled"]],
        "note": "; ".join(dict.fromkeys(half["note"] for half in facts if half["note"])),
    }


def _worst(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of differences as JSON, in which None is not finite."""
    return max(found, key=lambda one: float("inf") if one["error"] is None else one["error"])


def cast(
    graph: ir.Model, program: ExportedProgram, keep: Collection[str], reach: Mapping[str, scaled.Reach]
) -> list[str]:
    """Change the graph in place; names of the operations to keep that became products in float16 of scaled channels.
    reach: of `find`. Raises ExportError for an operation to keep that it lacks, and for control flow."""
    nodes = list(graph.graph)
    if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for node in nodes
           for attribute in node.attributes.values()):  # fmt: skip
        raise ExportError("ONNX export: fp16 of a model with loops or branches in its graph; export it as fp32")
    missing = set(keep) - {source(node) for node in nodes}
    if missing:
        raise ExportError(
            f"{', '.join(sorted(missing))} must stay in fp32 in an fp16 export, and the ONNX graph has no node of it."
            " Export it as fp32, or change the model so that its values stay below 65504."
        )
    types, large = scaled.fit(graph.graph, [(node, reach[source(node)]) for node in nodes if source(node) in reach])
    fitted = {source(node) for node in nodes if node in types}
    keep = set(keep) - fitted | {source(node) for node in large}  # with the views of their results
    _Caster(graph, exported.with_copies(program, keep), types).run()
    return sorted(fitted)


def source(node: ir.Node) -> str:
    """The name of the torch graph's node that a node was made from; "" where none is known."""
    return node.metadata_props.get(NODE, "").partition(" ")[0].lstrip("%").rstrip(":")


class _Caster:
    """keep: names of nodes of the torch graph that stay in float32. given: what some nodes compute in whatever their
    source, None: as their input is."""

    def __init__(
        self, model: ir.Model, keep: Collection[str], given: Mapping[ir.Node, ir.DataType | None] | None = None
    ) -> None:
        self.graph, self.keep, self.given = model.graph, keep, given or {}
        values = [*self.graph.inputs, *self.graph.initializers.values()]
        values += [output for node in self.graph for output in node.outputs]
        self.types: dict[ir.Value, ir.DataType] = {value: FLOAT for value in values if value.dtype == FLOAT}
        self.made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.kept_half = self._half_cache()

    def _half_cache(self) -> set[ir.Value]:
        """The outputs that stay half, because they are the inputs of the next call; those inputs are half from now on.
        All or none: a caller makes the empty ones of one type."""
        given = [value for value in self.graph.outputs if str(value.name).startswith(f"{PRESENT}.")]
        if any(producer is None or self._stays(producer) for producer in (v.producer() for v in given)):
            return set()
        for value in self.graph.inputs:
            if str(value.name).startswith(f"{PAST}."):
                self.types[value], value.type = HALF, ir.TensorType(HALF)
        return set(given)

    def run(self) -> None:
        for node in list(self.graph):
            self._node(node)
        for place, output in enumerate(self.graph.outputs):
            if self.types.get(output) == HALF and output not in self.kept_half:
                self.graph.outputs[place] = self._output(output)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]

    def _node(self, node: ir.Node) -> None:
        floats = [i for i, value in enumerate(node.inputs) if value is not None and value in self.types]
        makes = [output for output in node.outputs if output in self.types]
        wanted = self._wanted(node, floats, bool(makes))
        if node.op_type == "Cast":
            if makes:
                node.attributes["to"] = ir.AttrInt64("to", int(wanted))
        else:
            for i in floats:
                if i not in STAYS.get(node.op_type, ()):
                    value = node.inputs[i]
                    assert value is not None
                    node.replace_input_with(i, self._as(value, wanted))
        if node.op_type == "ConstantOfShape" and makes and "value" in node.attributes:
            filling = node.attributes["value"].as_tensor().numpy()
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(_number(filling, wanted)))
        for output in makes:
            self.types[output] = wanted
            output.type = ir.TensorType(wanted)

    def _wanted(self, node: ir.Node, floats: Sequence[int], makes: bool) -> ir.DataType:
        """What an operation computes in; a comparison or a size takes what it is given."""
        given = [self.types[v] for i in floats if (v := node.inputs[i]) is not None and v.const_value is None]
        if self.given.get(node, FLOAT) is None or not makes:
            return given[0] if given else FLOAT
        if self._stays(node) or any(_too_large(node.inputs[i]) for i in floats):
            return FLOAT
        return HALF

    def _stays(self, node: ir.Node) -> bool:
        return self.given[node] != HALF if node in self.given else source(node) in self.keep

    def _as(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """The value in a type, cast once for all who read it so."""
        if self.types[value] == wanted:
            return value
        known = self.made.get((value, wanted))
        if known is not None:
            return known
        name = f"{value.name}_{'half' if wanted == HALF else 'float'}"
        if value.const_value is not None:
            array = _number(value.const_value.numpy(), wanted)
            made = ir.Value(
                name=name, shape=value.shape, type=ir.TensorType(wanted), const_value=ir.tensor(array, name=name)
            )
            self.graph.register_initializer(made)
        else:
            node = ir.node("Cast", [value], attributes={"to": int(wanted)}, name=f"cast_{name}")
            (made,) = node.outputs
            made.name, made.shape, made.type = name, value.shape, ir.TensorType(wanted)
            producer = value.producer()
            if producer is None:
                self.graph.insert_before(self.graph[0], node)
            else:
                self.graph.insert_after(producer, node)
        self.made[value, wanted] = made
        self.types[made] = wanted
        return made

    def _output(self, output: ir.Value) -> ir.Value:
        """In float32 under its own name."""
        name = output.name
        output.name = f"{name}_half"
        made = self._as(output, FLOAT)
        made.name = name
        return made


def _too_large(value: ir.Value | None) -> bool:
    """A number that fp16 does not hold, and that does not mean infinity."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return False
    return HALF_MAX < abs(float(value.const_value.numpy().reshape(()))) < INFINITE


def _number(array: np.ndarray, wanted: ir.DataType) -> np.ndarray:
    """Constants as the search takes them: single numbers do not become infinite or 0."""
    if wanted == FLOAT:
        return array.astype(np.float32)
    if array.size == 1:
        x = array.astype(np.float64)
        x = np.where(np.abs(x) >= INFINITE, np.sign(x) * HALF_MAX, x)
        x = np.where((x != 0) & (np.abs(x) < HALF_LEAST), np.sign(x) * HALF_LEAST, x)
        return x.astype(np.float16)
    with np.errstate(over="ignore"):
        return array.astype(np.float16)
