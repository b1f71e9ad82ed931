"""What is in a Core ML package: stored types, operations by precision, casts."""

from __future__ import annotations

from collections import Counter
from typing import Any

from mptrain.mil.constants import CONSTANTS
from mptrain.mil.interpreter import LIMITS
from mptrain.mil.program import FLOATS, Name, Program, is_float

_BITS = {"FLOAT32": 32, "FLOAT16": 16, "INT32": 32, "UINT32": 32, "INT16": 16, "UINT16": 16, "INT8": 8, "UINT8": 8}
_INDICES = {"INT32", "UINT32", "INT16", "UINT16", "BOOL", "STRING", "OTHER"}  # positions, shapes and axes
_SMALL = 16  # constants with fewer elements are epsilons and factors


def facts(program: Program) -> dict[str, Any]:
    """JSON facts.

    weight_types: bytes of the weights in the file by stored type, the largest first;
    compressed: constants by the operation that decompresses them; operations: how many of
    each type; casts, float_casts: all conversions, and those between float16 and float32;
    fp32_operations: those that compute in float32 in a package with float16 ones.
    """
    sizes: Counter[str] = Counter()
    for kind, count in program.stored.values():
        if count >= _SMALL and kind not in _INDICES:
            sizes[kind.lower()] += -(-count * bits_of(kind) // 8)
    operations = [op for op in program.operations() if op.type not in CONSTANTS]
    dtypes = {name: value.dtype for name, value in program.values().items()}
    dtypes |= {feature.name: feature.dtype for feature in program.inputs}
    casts = [op for op in operations if op.type == "cast"]
    between = [op for op in casts if is_float(op.results[0].dtype) and is_float(_source(op, dtypes))]
    floats = [op for op in operations if op.results and is_float(op.results[0].dtype) and op.type != "cast"]
    half = [op for op in floats if op.results[0].dtype == "FLOAT16"]
    return {
        "emulated": LIMITS,
        "weight_types": dict(sizes.most_common()),
        "compressed": dict(Counter(op.type for op in program.operations() if op.type in CONSTANTS)),
        "operations": dict(Counter(op.type for op in operations).most_common()),
        "casts": len(casts),
        "float_casts": len(between),
        "fp32_operations": [op.name for op in floats if op.results[0].dtype == FLOATS[1]] if half else [],
        "inference_precision": "f16" if half else "f32",
    }


def bits_of(kind: str) -> int:
    """Of a stored type, "UINT4": 4; 8 for bool and strings."""
    if kind in _BITS:
        return _BITS[kind]
    digits = "".join(c for c in kind if c.isdigit())
    return int(digits) if digits else 8


def _source(operation: Any, dtypes: dict[str, str]) -> str:
    value = operation.inputs["x"][0]
    return dtypes.get(value.name, "") if isinstance(value, Name) else ""
