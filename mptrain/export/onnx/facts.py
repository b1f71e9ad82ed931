"""What is in an ONNX file, and what onnxruntime makes of it: stored types, attention, casts, layers in int8."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from mptrain.export.facts import Facts

ATTENTION = {"Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention"}
INTEGER = {
    "QLinearMatMul",
    "MatMulIntegerToFloat",
    "MatMulInteger",
    "QGemm",
    "QLinearConv",
    "ConvInteger",
    "QAttention",
}
WEIGHTED = {"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv", "MatMulNBits"}
_INDICES = {"INT64", "INT32", "BOOL"}  # shapes, axes and positions
FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16}
_SHORT = {ir.DataType.FLOAT: "f32", ir.DataType.FLOAT16: "f16", ir.DataType.BFLOAT16: "bf16"}
SCOPES, NODE = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.fx_node"
"""of a node's metadata: where in the torch model it comes from"""


def facts(path: Path) -> Facts:
    """weight_types, casts and float_casts are of the file; fused_attention, attention_layers, int8_layers and
    fp32_layers of the graph as onnxruntime optimizes it for this CPU. more: its operations."""
    model = ir.load(path)
    sizes: Counter[str] = Counter()
    packed: dict[str | None, str] = {}
    for node in model.graph.all_nodes():
        if node.op_type == "MatMulNBits":  # its integers are declared as bytes, two of 4 bits to one
            kind = f"UINT{node.attributes['bits'].as_int()}"
            packed |= {value.name: kind for value in (node.inputs[1], *node.inputs[3:4]) if value is not None}
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            sizes[packed.get(value.name, value.const_value.dtype.name)] += value.const_value.nbytes
    casts = [node for node in model.graph.all_nodes() if node.op_type == "Cast"]
    between = [node for node in casts if {v.dtype for v in (*node.inputs, *node.outputs) if v is not None} <= FLOATS]
    optimized = list(_optimized(path).graph.all_nodes())
    kinds = Counter(node.op_type for node in optimized)
    fused = [node for node in optimized if node.op_type in ATTENTION]
    apart = sum(node.op_type == "Softmax" and not _of_outputs(node) for node in optimized)
    types = {kind.lower(): size for kind, size in sizes.most_common() if kind not in _INDICES}
    named = {str(node.name): module(node) for node in model.graph.all_nodes()}  # the optimizer keeps names alone
    integer = [node for node in optimized if node.op_type in INTEGER]
    floating = [node for node in optimized if node.op_type in WEIGHTED and _weighted(node)]
    precisions: dict[str, Counter[str]] = {}
    for node in (*integer, *floating):
        precisions.setdefault(node.op_type, Counter())["i8" if node in integer else _computes(node)] += 1

    def modules(nodes: Iterable[ir.Node]) -> list[str]:
        return sorted(named.get(name, name) for name in (str(node.name) for node in nodes))

    return Facts(
        weight_types=types,
        inference_precision="f16" if types.get("float16", 0) > types.get("float", 0) else "f32",
        fused_attention=len(fused),
        fused_nodes=modules(fused),
        attention_layers=len(fused) + apart,
        int8_layers=modules(integer),
        fp32_layers=modules(floating),
        layer_precisions={kind: dict(found.most_common()) for kind, found in sorted(precisions.items())},
        casts=len(casts),
        float_casts=len(between),
        more={"operations": dict(kinds.most_common())},
    )


def _of_outputs(node: ir.Node) -> bool:
    """Whether a softmax makes probabilities that leave the model: attention multiplies its own with values."""
    (value,) = node.outputs
    readers = {reader.op_type for reader in value.consumers()}
    return not readers or readers == {"TopK"}


def together(*parts: Facts) -> Facts:
    """Of the files of one model."""

    def added(name: str) -> dict[str, int]:
        found = sum((Counter(getattr(part, name)) for part in parts), Counter[str]())
        return dict(found.most_common())

    def joined(name: str) -> list[str]:
        return [value for part in parts for value in getattr(part, name)]

    def summed(name: str) -> int:
        return sum(getattr(part, name) for part in parts)

    layers: dict[str, Counter[str]] = {}
    for part in parts:
        for kind, found in (part.layer_precisions or {}).items():
            layers.setdefault(kind, Counter()).update(found)
    computed = {part.inference_precision for part in parts}
    return Facts(
        weight_types=added("weight_types"),
        inference_precision=computed.pop() if len(computed) == 1 else "f32",
        fused_attention=summed("fused_attention"),
        fused_nodes=joined("fused_nodes"),
        attention_layers=summed("attention_layers"),
        int8_layers=joined("int8_layers"),
        fp32_layers=joined("fp32_layers"),
        layer_precisions={kind: dict(found) for kind, found in layers.items()},
        casts=summed("casts"),
        float_casts=summed("float_casts"),
        more={"operations": dict(sum((Counter(p.more["operations"]) for p in parts), Counter[str]()).most_common())},
    )


def module(node: ir.Node) -> str:
    """The torch module that a node is from, as far as the file or its name tells."""
    scopes = node.metadata_props.get(SCOPES)
    if not scopes:
        return node.name or node.op_type
    names = [name.strip(" '\"") for name in scopes.strip("[]").split(",")][1:-1]
    whole = names[-1:] and names[-1].startswith(f"{names[0]}.")  # torch gives whole paths, or their parts
    path = names[-1] if whole else ".".join(names)
    return path.removeprefix("model").removeprefix(".") or node.name or node.op_type


def _computes(node: ir.Node) -> str:
    """The type of what a layer reads; onnxruntime casts around those that it has no kernel for in half."""
    read = node.inputs[0]
    return "f32" if read is None or read.dtype is None else _SHORT.get(read.dtype, "f32")


def _weighted(node: ir.Node) -> bool:
    """Whether an operand is a constant: a product of two activations is no layer."""
    return any(value is not None and value.is_initializer() for value in node.inputs[1:])


def _optimized(path: Path) -> ir.Model:
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return ir.load(options.optimized_model_filepath)
