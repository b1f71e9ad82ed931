"""Scales that make the rounding error small, instead of ones that clip nothing.

    minimise over s, z     Σ_j d_j (w_j − ŵ_j)²        per unit (blockwise.py)

d = 1 is the mean squared error of the weight. d_j = E[x_j²] of the calibration inputs is
activation-aware: it is the error of the layer's output but for the correlations of its inputs,
which gptq.py adds.

The error has many local minima in s. The scales of a ladder below that of min-max bracket them
(each with a few zero points around the one that centres it), and the best is polished in turns: the
integers for a scale, then the scale that is best for the integers, s = Σ d w (q−z) / Σ d (q−z)².
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mptrain.compress.weights.grid import Grid, check_finite, half, min_max, to_levels
from mptrain.compress.weights.records import BlockQuantized

_FACTORS = torch.linspace(1.16, 0.4, 58)  # of the min-max scale; beyond 1 some integers fall better
_SHIFTS = (0, -1, 1)
_POLISH = 4
_ELEMENTS = 2**22  # at a time


def search(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> BlockQuantized:
    """The record of a float weight [out, in].

    importance: [in] or [out, in], at least 0; None for 1. Inputs that were never active count as
    little as possible, not as nothing. Raises ModelError for NaN and infinity.
    """
    check_finite(weight)
    d = torch.ones_like(weight) if importance is None else importance.to(weight).expand_as(weight)
    units, d = grid.units(weight.float()), grid.units(d.float())
    scale, zero = best_scales(units, grid, d)
    return grid.record(to_levels(units, scale, zero, grid), scale, zero, weight.shape)


def best_scales(units: Tensor, grid: Grid, importance: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, zero) [...] of units [..., n] with importance of the same shape."""
    rows = max(1, _ELEMENTS // max(1, units[0].numel()))
    parts = [_search(u, grid, d) for u, d in zip(units.split(rows), importance.split(rows), strict=True)]
    return torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts])


def _search(units: Tensor, grid: Grid, d: Tensor) -> tuple[Tensor, Tensor]:
    scale, zero = min_max(units, grid)
    # from here on [n, ...]: a scale stands beside its neighbours in memory, which takes half the time of one by one
    columns, d = (value.movedim(-1, 0).contiguous() for value in (units, d))
    mean = d.mean(0)
    d = torch.where(mean > 0, d / mean.clamp(min=torch.finfo(d.dtype).tiny), 1).clamp_(min=1e-6)
    best = _error(columns, scale, zero, grid, d)
    for other, offset in _candidates(columns, grid):
        best = _keep(columns, grid, d, (best, scale, zero), other, offset)
    for _ in range(_POLISH):
        shifted = (columns / scale).round_().add_(zero).clamp_(*grid.levels).sub_(zero)
        fitted = (d * columns * shifted).sum(0) / (d * shifted.square()).sum(0).clamp(min=1e-30)
        other = half(torch.where(fitted > 0, fitted, scale))
        best = _keep(columns, grid, d, (best, scale, zero), other, zero)
        if not grid.symmetric:
            for step in (-1, 1):
                best = _keep(columns, grid, d, (best, scale, zero), scale, (zero + step).clamp(*grid.levels))
    return scale, zero


def _candidates(columns: Tensor, grid: Grid) -> Iterator[tuple[Tensor, Tensor]]:
    _, high = grid.levels
    if grid.symmetric:
        largest = columns.abs().amax(0) / high
        for factor in _FACTORS.tolist():
            scale = half(largest * factor)
            yield scale, torch.zeros_like(scale)
        return
    low, top = columns.amin(0).clamp(max=0), columns.amax(0).clamp(min=0)
    for factor in _FACTORS[::2].tolist():
        scale = half((top - low) * factor / high)
        centred = ((high - (low + top) / scale) / 2).round()
        for shift in _SHIFTS:
            yield scale, (centred + shift).clamp(0, high)


def _keep(
    columns: Tensor, grid: Grid, d: Tensor, kept: tuple[Tensor, Tensor, Tensor], scale: Tensor, zero: Tensor
) -> Tensor:
    """Write what is better into the kept scale and zero; returns the errors."""
    best, kept_scale, kept_zero = kept
    error = _error(columns, scale, zero, grid, d)
    better = error < best
    torch.where(better, scale, kept_scale, out=kept_scale)
    torch.where(better, zero, kept_zero, out=kept_zero)
    return torch.minimum(error, best)


def _error(columns: Tensor, scale: Tensor, zero: Tensor, grid: Grid, d: Tensor) -> Tensor:
    """In units of the scale, where clipping to levels less the zero point takes one pass over memory."""
    low, high = grid.levels
    exact = columns / scale
    apart = exact.round().clamp_(low - zero, high - zero).sub_(exact)
    return apart.square_().mul_(d).sum(0).mul_(scale).mul_(scale)
