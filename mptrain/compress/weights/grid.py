"""Integer grids for weights, and rounding to the nearest point of one.

A unit is what shares a scale: the whole weight, a row, or `block` consecutive columns of a
row. With levels lo … hi (symmetric: −2^(b−1) … 2^(b−1)−1; asymmetric: 0 … 2^b−1)

    q = clip(round(w / s) + z, lo, hi)        ŵ = (q − z) · s

    symmetric    s = max|w| / hi                                     z = 0
    asymmetric   s = (max(w, 0) − min(w, 0)) / hi                    z = round(−min(w, 0) / s)

which are the conventions of Core ML, and for asymmetric grids those of NNCF. Scales are
rounded to fp16 before the integers are, for that is how every target stores them: ŵ is then
the same everywhere. A unit of zeros has the smallest scale and comes back as zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mptrain.compress.weights.records import BlockQuantized
from mptrain.core.errors import ModelError, UserError

_LEAST = 2.0**-24  # the smallest fp16
_MOST = 65504.0

Granularity = Literal["tensor", "channel", "block"]

AUTO = (64, 32, 16)
"""sizes of a block that is chosen to fit; a row that none of them divides is one unit"""


@dataclass(frozen=True)
class Grid:
    """block_size: columns to a scale, for granularity `block` only; it must divide a weight's columns."""

    bits: int = 4
    granularity: Granularity = "block"
    block_size: int = 32
    symmetric: bool = True

    @property
    def levels(self) -> tuple[int, int]:
        half = 2 ** (self.bits - 1)
        return (-half, half - 1) if self.symmetric else (0, 2 * half - 1)

    def block(self, columns: int) -> int:
        """Columns to a scale in a weight of so many columns. Raises UserError for a last block that is not whole."""
        if self.granularity != "block":
            return columns
        if columns % self.block_size:
            fits = next(n for n in range(min(self.block_size, columns), 0, -1) if columns % n == 0)
            raise UserError(
                f"block_size {self.block_size} does not divide {columns} columns, and no target stores a partial"
                f" block: use {fits}, or granularity channel for this weight (overrides)"
            )
        return self.block_size

    @classmethod
    def fitting(
        cls, columns: int, bits: int, granularity: Granularity, block_size: int | Literal["auto"], symmetric: bool
    ) -> Grid:
        """With blocks that divide so many columns where their size is left open; see AUTO."""
        if block_size != "auto":
            return cls(bits, granularity, block_size, symmetric)
        found = next((size for size in AUTO if columns % size == 0), None)
        if found is None and granularity == "block":
            return cls(bits, "channel", symmetric=symmetric)
        return cls(bits, granularity, found or max(AUTO), symmetric)

    def units(self, weight: Tensor) -> Tensor:
        """[out, in] as [out, blocks, block], or [1, 1, out · in] for one scale; shares memory."""
        if self.granularity == "tensor":
            return weight.reshape(1, 1, -1)
        return weight.unflatten(1, (-1, self.block(weight.shape[1])))

    def record(self, q: Tensor, scale: Tensor, zero: Tensor, shape: torch.Size) -> BlockQuantized:
        """A record, on the CPU, of whole-numbered float `q` in units; scale and zero lack the last axis of units."""
        dtype = torch.int8 if self.symmetric else torch.uint8
        kept = None if self.symmetric else zero.to("cpu", dtype).contiguous()
        stored = q.to("cpu", dtype).reshape(shape).contiguous()  # converters read memory as it lies
        return BlockQuantized(stored, scale.to("cpu", torch.float32).contiguous(), kept, self.bits)


def min_max(units: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """(scale, zero) [...] of units [..., n]: nothing is clipped."""
    _, high = grid.levels
    if grid.symmetric:
        scale = half(units.abs().amax(-1) / high)
        return scale, torch.zeros_like(scale)
    low, top = units.amin(-1).clamp(max=0), units.amax(-1).clamp(min=0)
    scale = half((top - low) / high)
    return scale, (-low / scale).round().clamp(0, high)


def to_levels(units: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Whole numbers, as floats, of units [..., n] with scale and zero [...]."""
    return (units / scale[..., None]).round_().add_(zero[..., None]).clamp_(*grid.levels)


def half(scale: Tensor) -> Tensor:
    """Positive scales rounded to fp16, none of them zero."""
    return scale.clamp(_LEAST, _MOST).half().to(scale.dtype)


def round_to_nearest(weight: Tensor, grid: Grid) -> BlockQuantized:
    """The record of a float weight [out, in] with the scales of `min_max`. Raises ModelError for NaN and infinity."""
    check_finite(weight)
    units = grid.units(weight.float())
    scale, zero = min_max(units, grid)
    return grid.record(to_levels(units, scale, zero, grid), scale, zero, weight.shape)


def check_finite(weight: Tensor) -> None:
    bad = weight.numel() - int(weight.isfinite().sum())
    if bad:
        raise ModelError(
            f"{bad} of {weight.numel()} weights are NaN or infinite: the training that made them diverged, lower its lr"
        )
    if weight.numel() and float(weight.abs().max()) > _MOST:
        raise ModelError(f"a weight is {float(weight.abs().max()):g}, beyond fp16, in which every target stores scales")


def joined(parts: Sequence[BlockQuantized]) -> BlockQuantized:
    """One record of the rows of several, which have their scales by row or block."""
    if len(parts) == 1:
        return parts[0]
    zeros = [part.zero for part in parts if part.zero is not None]
    return replace(
        parts[0],
        q=torch.cat([part.q for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat(zeros) if zeros else None,
    )
