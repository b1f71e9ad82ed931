"""What a Core AI asset holds: stored types, attention blocks, casts between float and half."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from mptrain.export.coreai.asset import load
from mptrain.export.facts import Facts

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of deprecations inside the package
    from coreai.authoring.asset import AIProgram

FUNCTION = "main"

_INDICES = {"Int16", "Int32", "Int64", "UInt16", "UInt32", "UInt64", "Bool"}  # shapes, axes and positions
_ATTENTION = '"scaled_dot_product_attention"'


def facts(path: Path, execution: str) -> Facts:
    """Of an asset.

    fused_attention: of composite operations. casts: in the graph; composite operations such as layer_norm have
    their own inside. execution: what computed the scores. more: minimum_os, of the file.
    """
    asset: Any = load(path)
    program = asset.program
    attention = {
        str(graph.attributes["sym_name"]).strip('"')
        for graph in program._module._mlir_module.body.operations
        if "composite_decl" in graph.attributes and _ATTENTION in str(graph.attributes["composite_decl"])
    }
    fused = unfused = 0
    for operation in program._get_graph(FUNCTION).bodyRegion.blocks[0].operations:
        if operation.name == "coreai.invoke":
            callee = re.search(r"@([\w.$-]+)", str(operation.attributes["callee"]))
            fused += callee is not None and callee[1] in attention
        elif operation.name == "coreai.softmax":
            unfused += 1
    types = stored_types(path)
    return Facts(
        fused_attention=fused,
        attention_layers=fused + unfused,
        weight_types=types,
        inference_precision="f16" if types.get("Float16", 0) > types.get("Float32", 0) else "f32",
        casts=float_casts(program),
        execution=execution,
        more={"minimum_os": asset.summary(include_statistics=False)._compatibility_version},
    )


def stored_types(asset: Path) -> dict[str, int]:
    """Bytes of the weights, with scales and tables, by element type ("Float32", "UInt4"); the largest first."""
    sizes: Counter[str] = Counter()
    summary: Any = load(asset).summary()
    for kind, count in summary.storage_types:
        digits = re.search(r"\d+", kind)
        sizes[kind] += -(-count * (int(digits[0]) if digits else 8) // 8)
    return {kind: size for kind, size in sizes.most_common() if kind not in _INDICES}


def float_casts(program: AIProgram) -> int:
    """Conversions between float and half. Composite operations such as layer_norm have more inside: not counted."""
    graph: Any = program._get_graph(FUNCTION)
    casts = (op for op in graph.bodyRegion.blocks[0].operations if op.name == "coreai.cast")
    ends = ({str(value.type.element_type) for value in (op.operands[0], op.results[0])} for op in casts)
    return sum(pair == {"f16", "f32"} for pair in ends)
