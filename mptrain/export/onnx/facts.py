"""What is in an ONNX file, and what onnxruntime makes of it: stored types, attention, casts, layers in int8."""

from __future__ import annotations

import tempfile
from collections import Counter
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
    fused = sum(kinds[kind] for kind in ATTENTION)
    types = {kind.lower(): size for kind, size in sizes.most_common() if kind not in _INDICES}
    named = {str(node.name): module(node) for node in model.graph.all_nodes()}  # the optimizer keeps names alone
    integer = [str(node.name) for node in optimized if node.op_type in INTEGER]
    floating = [str(node.name) for node in optimized if node.op_type in WEIGHTED and _weighted(node)]
    return Facts(
        weight_types=types,
        inference_precision="f16" if types.get("float16", 0) > types.get("float", 0) else "f32",
        fused_attention=fused,
        attention_layers=fused + kinds["Softmax"],
        int8_layers=sorted(named.get(name, name) for name in integer),
        fp32_layers=sorted(named.get(name, name) for name in floating),
        casts=len(casts),
        float_casts=len(between),
        more={"operations": dict(kinds.most_common())},
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
