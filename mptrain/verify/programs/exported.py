"""An exported graph as a `Program`: what a Core AI asset of it computes in fp16, op by op.

The nodes of the graph are the ops, under their names, so that what a search keeps in fp32 is what the
export keeps. Views and copies keep the precision of what they show; what depends on weights alone
(decompressed tables) is computed once. Numbers in an operation become fp16 as coreai-opt's cast makes them:
from 1e38 on they mean infinity and become 65504; an op with one between 65504 and that stays in fp32. It leaves
integers to the converter, which makes inf of those above 65504.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from mptrain.core.signature import Signature
from mptrain.verify.difference import of_tensors
from mptrain.verify.outputs import rows
from mptrain.verify.overflow import Op, Watch
from mptrain.verify.ranges import HALF_LEAST, HALF_MAX

_COPIES = {"alias", "clone", "_to_copy", "detach", "lift_fresh_copy", "copy", "getitem", "_unsafe_view"}
_INFINITE = 1e38


class GraphOps:
    """`mptrain.verify.overflow.Program` of a decomposed fp32 export.

    outputs: names of its outputs. inputs: names in the order of its user inputs. batches: model inputs
    without labels. signature: says what of the outputs is padding and not compared; without one nothing is.
    """

    def __init__(
        self,
        program: ExportedProgram,
        inputs: Sequence[str],
        outputs: Sequence[str],
        batches: Sequence[Mapping[str, Tensor]],
        signature: Signature | None = None,
    ) -> None:
        self._signature = signature
        self._nodes = list(program.graph.nodes)
        self._names, self._outputs, self._batches = list(inputs), list(outputs), batches
        self._constants = dict(_weights(program))
        users = [n for n in self._nodes if n.op == "placeholder" and n.name not in self._constants]
        self._users = {node.name: name for node, name in zip(users, inputs, strict=True)}
        for node in self._nodes:
            known = all(source.name in self._constants for source in node.all_input_nodes)
            if node.op == "call_function" and known and node.all_input_nodes:
                self._constants[node.name] = _call(node, self._constants)
        self._computed = [n for n in self._nodes if n.op == "call_function" and n.name not in self._constants]
        self._rounded: dict[str, Tensor] = {}
        self._ops = list(self._named())

    @property
    def ops(self) -> Sequence[Op]:
        return self._ops

    @property
    def batches(self) -> int:
        return len(self._batches)

    def run(self, batch: int, keep: Collection[str], watch: Watch | None = None) -> Mapping[str, Tensor]:
        inputs = self._batches[batch]
        return rows(self.outputs(inputs, keep, watch), inputs, self._signature)

    @torch.no_grad()
    def harm(self, batch: int, ops: Collection[str]) -> Mapping[str, float]:
        found: dict[str, float] = {}
        values = self._inputs(self._batches[batch])
        for node in self._computed:
            values[node.name] = _call(node, values)
            if node.name in ops:
                exact, half = _floats(values[node.name]), _floats(self._half_call(node, values, ()))
                found[node.name] = of_tensors(exact[0], _half(half[0])).error
        return found

    @torch.no_grad()
    def channels(self, batch: int, ops: Collection[str]) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Of those ops that are products x·W with W [K, N] of weights alone: the largest magnitudes of the channels of
        x [K] and of the result [N], nothing rounded."""
        kept = (node for node in self._computed if node.name in ops)
        products = {node.name: x.name for node in kept if (x := self._multiplied(node)) is not None}
        values = self._inputs(self._batches[batch])
        for node in self._computed if products else ():
            values[node.name] = _call(node, values)
        return {name: (_largest(values[x]), _largest(values[name])) for name, x in products.items()}

    def _multiplied(self, node: fx.Node) -> fx.Node | None:
        """What a product with weights multiplies."""
        places = {"linear": (0, 1), "mm": (0, 1), "matmul": (0, 1), "addmm": (1, 2)}.get(_kind(node).partition(".")[0])
        if places is None:
            return None
        x, weights = (node.args[place] for place in places)
        if not isinstance(x, fx.Node) or not isinstance(weights, fx.Node) or weights.name not in self._constants:
            return None
        return x if self._constants[weights.name].dim() == 2 else None

    def _inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Values of the graph before any is computed."""
        return self._constants | {node: batch[name] for node, name in self._users.items()}

    def outputs(
        self, inputs: Mapping[str, Tensor], keep: Collection[str], watch: Watch | None = None
    ) -> dict[str, Tensor]:
        """All outputs by name, every row of them."""
        values = self._inputs(inputs)
        halves: set[str] = set()  # nodes whose value is already rounded
        for node in self._computed:
            if _is_copy(node):
                values[node.name] = _call(node, values)
                if node.all_input_nodes and node.all_input_nodes[0].name in halves:
                    halves.add(node.name)
                continue
            if not _is_op(node):
                values[node.name] = _call(node, values)
                continue
            if node.name not in keep:
                result = tree_map_only(Tensor, _half, self._half_call(node, values, halves))
                halves.add(node.name)
            else:
                result = _call(node, values)
            values[node.name] = result
            if watch is not None:
                for value in _floats(result)[: None if isinstance(result, Tensor) else 1]:
                    watch(node.name, value)
        results = [values[source.name] for source in self._nodes[-1].args[0]]
        return dict(zip(self._outputs, results, strict=True))

    def _half_call(self, node: fx.Node, values: Mapping[str, Any], halves: Collection[str]) -> Any:
        if any(HALF_MAX < abs(x) < _INFINITE for x in tree_leaves((node.args, node.kwargs)) if isinstance(x, float)):
            return _call(node, values)

        def operand(argument: Any) -> Any:
            if isinstance(argument, float):
                return _half_number(argument)
            if not isinstance(argument, fx.Node):
                return argument
            name = argument.name
            value = values[name]
            if name in halves or not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            if name not in self._constants:
                return _half(value)
            if name not in self._rounded:
                self._rounded[name] = _half(value)
            return self._rounded[name]

        arguments = [_half_integer(node, place, value) for place, value in enumerate(tree_map(operand, node.args))]
        return node.target(*arguments, **tree_map(operand, node.kwargs))  # type: ignore[operator]

    def _named(self) -> Iterator[Op]:
        makers: dict[str, tuple[str, ...]] = {}  # node -> ops whose values it holds
        for node in self._computed:
            sources = tuple(dict.fromkeys(op for source in node.all_input_nodes for op in makers.get(source.name, ())))
            makers[node.name] = (node.name,) if _is_op(node) else sources if _is_copy(node) else ()
            if _is_op(node):
                yield Op(node.name, _kind(node), module(node), sources)


def module(node: fx.Node) -> str:
    """Name of the source model's module that the node is from, "" outside."""
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return stack[-1].removeprefix("model").removeprefix(".") if stack else ""


def with_copies(program: ExportedProgram, keep: Collection[str]) -> set[str]:
    """`keep` and the views and copies of what they make."""
    found = set(keep)
    for node in program.graph.nodes:
        if node.op == "call_function" and _is_copy(node) and node.all_input_nodes[:1]:
            found |= {node.name} if node.all_input_nodes[0].name in found else set()
    return found


def in_fp32(nodes: Iterable[fx.Node]) -> set[str]:
    """Names of the operations whose results a cast graph has in fp32; a constant is none."""
    made = (node for node in nodes if node.op == "call_function" and node.all_input_nodes and _is_op(node))
    return {node.name for node in made if any(t.dtype == torch.float32 for t in _floats(node.meta["val"]))}


def _weights(program: ExportedProgram) -> Iterator[tuple[str, Tensor]]:
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            store = program.constants if spec.target in program.constants else program.state_dict
            yield spec.arg.name, store[spec.target]


def _kind(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.partition("::")[2] if schema is not None else getattr(node.target, "__name__", "")


def _is_copy(node: fx.Node) -> bool:
    return bool(getattr(node.target, "is_view", False)) or _kind(node) in _COPIES


def _is_op(node: fx.Node) -> bool:
    """Whether it makes a tensor of floats, and is no copy."""
    return not _is_copy(node) and bool(_floats(node.meta.get("val")))


def _call(node: fx.Node, values: Mapping[str, Any]) -> Any:
    def operand(argument: Any) -> Any:
        return values[argument.name] if isinstance(argument, fx.Node) else argument

    return node.target(*tree_map(operand, node.args), **tree_map(operand, node.kwargs))  # type: ignore[operator]


def _largest(value: Tensor) -> Tensor:
    """Of each channel, the last axis."""
    return value.detach().abs().flatten(0, -2).amax(0)


def _floats(result: Any) -> list[Tensor]:
    return [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]


def _half(value: Tensor) -> Tensor:
    return value.half().to(value.dtype) if value.is_floating_point() else value


def _half_number(value: float) -> float:
    if abs(value) >= _INFINITE:
        return HALF_MAX if value > 0 else -HALF_MAX
    if 0 < abs(value) < HALF_LEAST:
        return HALF_LEAST if value > 0 else -HALF_LEAST
    return torch.tensor(value).half().item()


def _half_integer(node: fx.Node, place: int, value: Any) -> Any:
    """An integer that is an operand, not an axis or a size."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or type(value) is not int or str(schema.arguments[place].type) not in ("number", "Tensor"):
        return value
    return torch.tensor(float(value)).half().item()
