"""Which arguments coreai-torch 0.4.3 reads, and what is written out for it."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram

from mptrain.export.torch import arguments as written

aten: Any = torch.ops.aten

READ: dict[str, set[str]] = {
    "addmm": {"alpha", "beta"},
    "div": {"rounding_mode"},
    "gelu": {"approximate"},
    "round": {"decimals"},
    "scaled_dot_product_attention": {"attn_mask", "is_causal", "scale", "enable_gqa"},
    "scatter": {"reduce"},
}
"""keywords that coreai-torch's lowering of an operation reads"""
IGNORED: dict[str, set[str]] = {"avg_pool2d": {"ceil_mode", "count_include_pad", "divisor_override"}}
"""arguments by place that it does not read"""
WRITTEN_OUT = {
    aten.avg_pool2d.default: written.avg_pool2d,
    aten.scalar_tensor.default: written.scalar_tensor,
    aten.var.correction: written.var,
    aten.upsample_nearest2d.vec: written.upsample_nearest2d,
}


def table(theirs: Any) -> Any:
    """coreai-torch's decompositions and ours; where both know an operation, theirs leads to one that ours know."""
    for operation, replacement in (written.decompositions() | WRITTEN_OUT).items():
        if operation not in theirs:
            theirs[operation] = replacement
    return theirs


def check(program: ExportedProgram) -> None:
    """Raises ExportError that names the operations with an argument that coreai-torch does not read."""
    written.check(program, "Core AI", READ, IGNORED)
