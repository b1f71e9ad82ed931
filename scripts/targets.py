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
    Row(
        "Core AI",
        "int8 and int4 of JPQD, QAT and PTQ",
        "stored",
        "si8, ui8, si4 or ui4 constants with their learned scales (blockwise_shift_scale); activations compute in"
        " floating point, their learned ranges are left out; embeddings are int8 by row where the recipe says so",
    ),
    Row(
        "Core AI",
        "2, 4 and 8 bit weights, per tensor, row or block",
        "stored",
        "si2 … ui8 constants with their scales and zero points; 1, 3, 5, 6 and 7 bit integers take the next width",
    ),
    Row(
        "Core AI",
        "look-up tables of 1, 2, 3, 4, 6 and 8 bits: per tensor, grouped, vector, with a scale per row",
        "stored",
        "lut_to_dense on uiN indices; a last group of fewer rows repeats tables; 5 and 7 bits take the next width",
    ),
    Row(
        "Core AI",
        "fake quantizers as such",
        "refused",
        "UserError: the integers are exported (quantizer_records.weight_only), as the recipe's `coreai` format does",
    ),
    Row(
        "Core ML, iOS 18",
        "int8 of JPQD, QAT and PTQ",
        "stored",
        "int8 weights with their learned scales (constexpr_blockwise_shift_scale); quantizers of activations are"
        " dropped: the package computes in floating point",
    ),
    Row(
        "Core ML, iOS 18",
        "int4 and int8 weights, per tensor, row or block",
        "stored",
        "int4, uint4, int8 or uint8 data, scales in the precision of the package; other widths in the next of 4 and 8",
    ),
    Row(
        "Core ML, iOS 18",
        "look-up tables",
        "stored",
        "constexpr_lut_to_dense, 1 to 8 bits (5 as 6, 7 as 8), a table to each group of rows, scalar or vector; a"
        " weight whose rows are no multiple of the group is expanded to floats, and the report says so",
    ),
    Row(
        "Core ML, iOS 18",
        "look-up tables with a scale to each row",
        "refused",
        "they crash on some GPUs (coremltools issue 2688); `scaled_tables: true` stores them all the same",
    ),
    Row(
        "Core ML, iOS 16 and 17",
        "int8 of JPQD, QAT and PTQ",
        "stored",
        "constexpr_affine_dequantize, one scale to the tensor or row",
    ),
    Row("Core ML, iOS 16 and 17", "int4 weights, blocks", "refused", "need minimum_deployment_target iOS18"),
    Row(
        "Core ML, iOS 16 and 17",
        "look-up tables",
        "stored",
        "one scalar table to the tensor, of 1, 2, 4, 6 or 8 bits; groups, vectors and 3 bits are refused",
    ),
    Row("Core ML, iOS 15", "any", "refused", "Core ML would silently expand every weight"),
]


def markdown() -> str:
    """The table as a section of docs/recipes.md."""
    lines = ["| Target | Compression | Result | How |", "|---|---|---|---|"]
    lines += [f"| {row.target} | {row.compression} | {row.result} | {row.detail} |" for row in ROWS]
    return "## What each target stores\n\n" + "\n".join(lines) + "\n"
