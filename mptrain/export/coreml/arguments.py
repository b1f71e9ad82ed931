"""Which arguments coremltools 9.0 reads, and what is written out for it."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram

from mptrain.export.torch import arguments as written

aten: Any = torch.ops.aten

READ: dict[str, set[str]] = {
    "div": {"rounding_mode"},
    "scaled_dot_product_attention": {"scale", "enable_gqa"},
    "_scaled_dot_product_flash_attention_for_cpu": {"attn_mask", "scale"},
    "scatter": {"reduce"},
    "searchsorted": {"out_int32", "right", "side"},
    "std": {"correction", "keepdim"},
    "var": {"correction", "keepdim"},
    "linalg_vecdot": {"dim"},
    "meshgrid": {"indexing"},
}
"""keywords that coremltools' translation of an operation reads"""
MISTAKEN = {"_upsample_bilinear2d_aa", "diagonal"}
"""operations that coremltools translates to something else"""
WRITTEN_OUT = {
    aten.gelu.default: written.gelu,
    aten.clamp.Tensor: written.clamp,
    aten.diagonal.default: written.diagonal,
    aten.reciprocal.default: written.reciprocal,
}


def table() -> dict[Any, Any]:
    return written.decompositions() | WRITTEN_OUT


def check(program: ExportedProgram) -> None:
    """Raises ExportError that names the operations with an argument that coremltools does not read."""
    written.check(program, "Core ML", READ, {})
