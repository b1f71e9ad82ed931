"""Embeddings in int8 while the model trains: the rows that are looked up, as exports store them.

    s     of a row, max|w| / 127, rounded to fp16
    y     round(w / s) · s; gradients pass as if nothing were rounded

No ranges, so nothing to learn, to slice or to save. It is the rounding of `grid.round_to_nearest`, to the bit: what is
trained and scored is what is exported. A model that first meets its rounded tables in the export decides otherwise than
it was scored, for its 8-bit activations then round anew (benchmarks/export/int8_runtimes.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mptrain.compress.weights.grid import Grid, min_max, to_levels

GRID = Grid(bits=8, granularity="channel")


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        units = rows.float()
        scale, zero = min_max(units, GRID)
        return to_levels(units, scale, zero, GRID).mul_(scale[..., None]).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> Tensor:
        return dy[0]


class RowQuantizer(nn.Module):
    """Rounds rows [..., width] of an embedding, each with a scale of its own. table: name of the embedding."""

    def __init__(self, table: str) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # NNCF's mode would step into every operation here
            return _Rounded.apply(x)
