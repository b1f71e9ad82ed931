"""What each export target makes of each compression: documentation that tests hold to the artefacts.

stored: the very integers, scales or tables of the torch model. expanded: the values are exact,
the size is not. refused: an error says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    target: str
    compression: str
    result: Literal["stored", "expanded", "refused"]
    detail: str


ROWS = [
    Row(
        "OpenVINO",
        "int8 of JPQD, QAT and PTQ",
        "stored",
        "i8 weights with their learned scales, FakeQuantize on the inputs of their layers",
    ),
    Row(
        "OpenVINO",
        "int4 and int8 weights, per tensor, row or block",
        "stored",
        "i4, u4, i8 or u8 constants (asymmetric: unsigned) with fp16 scales, as NNCF lays them out",
    ),
    Row(
        "OpenVINO",
        "look-up tables",
        "expanded",
        "float32: the CPU plugin has no kernel that keeps a table, and would expand it when the model is loaded",
    ),
]


def markdown() -> str:
    """The table as a section of docs/recipes.md."""
    lines = ["| Target | Compression | Result | How |", "|---|---|---|---|"]
    lines += [f"| {row.target} | {row.compression} | {row.result} | {row.detail} |" for row in ROWS]
    return "## What each target stores\n\n" + "\n".join(lines) + "\n"
