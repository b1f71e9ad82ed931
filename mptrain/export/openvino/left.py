"""Which nodes of a quantized IR stay in float because the recipe said so (`quantize.ignore`), by what it named.

    module.gem          every operation below  __module.module.gem/  and  __module.module.gem.…/
    module.gem/pow/1    __module.module.gem/aten::pow/Power_1: of the nodes of one type that `pow` made there, in the
                        order of their numbers, the second part of as many parts as torch calls it

The names are those of the file. A node that reads what a FakeQuantize gives, as it is or moved, is not in float,
whatever was asked for, so it is left out. An operation that the converter merges into others has no node.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import openvino as ov

from mptrain.compress.structure.scopes import openvino_module

_FUNCTION = re.compile(r"^__module\.[^/]+/aten::(\w+)/(.+?)(?:_(\d+))?$")
_MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Concat", "Split", "VariadicSplit", "StridedSlice", "Gather"}
_NONE = {"Constant", "Convert", "FakeQuantize", "Result", "Parameter", *_MOVES}
_CALLED = {"conv1d": "convolution", "conv2d": "convolution"}
"""functions of torch that have another name in a trace"""


def left(graph: ov.Model, asked: Mapping[str, Any]) -> dict[str, list[str]]:
    """{module or operation: friendly names}. asked: as `core.hooks.LEFT` says."""
    found = {module: list(_below(graph, module)) for module in asked["modules"]}
    return found | {scope: _of_operation(graph, scope, calls) for scope, calls in asked["operations"].items()}


def _below(graph: ov.Model, module: str) -> Iterator[str]:
    for node in _float(graph):
        owner = openvino_module(node.get_friendly_name())
        if owner is not None and f"{owner}.".startswith(f"{module}."):
            yield node.get_friendly_name()


def _of_operation(graph: ov.Model, scope: str, calls: int) -> list[str]:
    module, function, call = scope.rsplit("/", 2)
    by_type: dict[str, list[tuple[int, ov.Node]]] = {}
    for node in graph.get_ordered_ops():
        name = node.get_friendly_name()
        parsed = _FUNCTION.match(name)
        if parsed is None or openvino_module(name) != module or node.get_type_name() in _NONE:
            continue
        if parsed[1].strip("_") == _CALLED.get(function, function):
            by_type.setdefault(parsed[2], []).append((int(parsed[3] or 0), node))
    names = []
    for nodes in by_type.values():
        each, rest = divmod(len(nodes), calls)
        ordered = [node for _, node in sorted(nodes, key=lambda pair: pair[0])]
        mine = ordered if rest or not each else ordered[int(call) * each : (int(call) + 1) * each]
        names += [node.get_friendly_name() for node in mine if _is_float(node)]
    return names


def _float(graph: ov.Model) -> Iterator[ov.Node]:
    return (node for node in graph.get_ordered_ops() if node.get_type_name() not in _NONE and _is_float(node))


def _is_float(node: ov.Node) -> bool:
    return node.get_output_element_type(0).is_real() and not any(
        _quantized(value.get_node()) for value in node.input_values()
    )


def _quantized(node: ov.Node) -> bool:
    while node.get_type_name() in _MOVES:
        node = node.input_value(0).get_node()
    return node.get_type_name() == "FakeQuantize"
