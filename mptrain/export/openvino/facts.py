"""What the CPU plugin made of an IR: fused attention, layers that compute in int8, stored types, precision."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import openvino as ov

from mptrain.compress.structure.scopes import openvino_module
from mptrain.export.facts import Facts
from mptrain.export.openvino.recurrence import graphs_of

_FUSED = {"Subgraph", "MHA", "ScaledDotProductAttention"}
_INTEGER = {"i8", "u8"}
_WEIGHTED = {"FullyConnected", "Convolution"}
_STEPWISE = {"TensorIterator", "Loop", "RNNSeq"}
_AROUND = "aten::"  # no module before it: computed around the model, as heads are
_INDICES = {"i64", "i32", "boolean"}  # constants of these types are shapes, axes and positions


def facts(compiled: ov.CompiledModel, xml: Path, precision: str) -> Facts:
    """Of a compiled model. xml: its file. precision: that the plugin took.

    int8_layers, fp32_layers: by whether the inputs of a layer arrive as 8-bit integers; one with only its weight
    compressed computes in floating point. more: converts, the conversions left in the graph that runs;
    dynamic_quantization_group_size, 0 where activations before compressed weights stay float; loops, where there are
    any, the operations that run step by step, by kind.
    """
    unfused = converts = 0
    fused: list[str] = []
    layers: dict[bool, list[str]] = {True: [], False: []}
    precisions: dict[str, Counter[str]] = {}
    loops: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {key: value.astype(str) for key, value in node.get_rt_info().items()}
        kind = info["layerType"]
        if kind in _FUSED and _has_softmax(info["originalLayersNames"]):
            fused.append(node.get_friendly_name())
        elif kind == "Softmax" and not info["originalLayersNames"].startswith(_AROUND):
            unfused += 1
        elif kind == "Convert":
            converts += 1
        elif kind in _STEPWISE:
            loops[kind] += 1
        elif kind in _WEIGHTED:
            name = node.get_friendly_name()
            read = node.input(0).get_element_type().get_type_name()  # the plugin computes in the type that it reads
            layers[read in _INTEGER].append(openvino_module(name) or name)
            precisions.setdefault(kind, Counter())["i8" if read in _INTEGER else read] += 1
    more = {"converts": converts, "dynamic_quantization_group_size": _group(compiled)}
    return Facts(
        fused_attention=len(fused),
        fused_nodes=sorted(fused),
        attention_layers=len(fused) + unfused,
        int8_layers=sorted(layers[True]),
        fp32_layers=sorted(layers[False]),
        layer_precisions={kind: dict(found.most_common()) for kind, found in sorted(precisions.items())},
        weight_types=stored_types(ov.Core().read_model(xml)),
        inference_precision=precision,
        more=more | ({"loops": dict(loops)} if loops else {}),
    )


def stored_types(graph: ov.Model) -> dict[str, int]:
    """Bytes of the weights, with their scales, by element type; the largest first."""
    sizes: Counter[str] = Counter()
    for node in (node for inner in graphs_of(graph) for node in inner.get_ops()):
        if node.get_type_name() == "Constant":
            sizes[node.get_element_type().get_type_name()] += node.get_byte_size()
    return {kind: size for kind, size in sizes.most_common() if kind not in _INDICES}


def _group(compiled: ov.CompiledModel) -> int:
    """Values of an activation that share a scale when they are rounded to 8 bits before compressed weights."""
    return int(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE"))


def _has_softmax(original_layers: str) -> bool:
    return "softmax" in original_layers.lower() or "scaled_dot_product" in original_layers
