"""Coordinate descent on the loss of a layer, from integers and scales that are given.

    minimise     tr (W − Ŵ) H (W − Ŵ)ᵀ,     ŵ = (q − z) · s

All but one variable are held fixed, and the one takes its best value; with g = (Ŵ − W) H, a row each:

    an integer    the level nearest to ŵ_j − g_j / H_jj, in units of s: the best of all levels, for the loss is a
                  parabola in ŵ_j
    a scale       of its unit's p = q − z:     s −= Σ g p / Σ (p H) p,     rounded to fp16, where that is lower
    a zero point  one up or down with the same q, where that is lower, which moves all weights of its unit by s

A sweep goes through the units in turn, their integers and then their zero points and scale. No step raises the
loss, so it ends where it began or below; that is a local minimum and not the best of all. (Rounding by coordinates
after GPTQ: e.g. Behdin et al. 2023, arXiv 2309.01885.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mptrain.compress.weights.grid import Grid, half

_PANEL = 128


@dataclass
class Rounded:
    """q: whole numbers, as floats, [in, out]. scale, zero: [units, out], or of one scale for all [1, 1]."""

    q: Tensor
    scale: Tensor
    zero: Tensor

    def values(self) -> Tensor:
        """[in, out], what the integers stand for."""
        units = self.q.unflatten(0, (len(self.scale), -1))
        return ((units - self.zero[:, None]) * self.scale[:, None]).flatten(0, 1)


def descend(target: Tensor, hessian: Tensor, found: Rounded, grid: Grid, sweeps: int) -> None:
    """Change `found` in place. target: W transposed, [in, out]. hessian: positive definite, [in, in], as target."""
    block = len(target) // len(found.scale)
    gradient = hessian @ (found.values() - target)
    for _ in range(sweeps):
        for number in range(len(found.scale)):
            unit = slice(number * block, (number + 1) * block)
            q, scale, zero = found.q[unit], found.scale[number], found.zero[number]
            before = (q - zero) * scale
            h, g = hessian[unit, unit], gradient[unit].clone()
            _integers(q, scale, zero, h, g, grid)
            if not grid.symmetric:
                zero = _zero(q, scale, zero, h, g, grid)
            found.zero[number], found.scale[number] = zero, _scale(q - zero, scale, h, g)
            gradient += hessian[:, unit] @ ((q - zero) * found.scale[number] - before)


def _integers(q: Tensor, scale: Tensor, zero: Tensor, h: Tensor, g: Tensor, grid: Grid) -> None:
    """Change q, and g with it, of one unit; in panels, so that what a column changes is mostly one product."""
    diagonal = h.diagonal()
    for start in range(0, len(q), _PANEL):
        part = slice(start, start + _PANEL)
        near, mine, here = g[part], q[part], h[part, part]
        before = mine.clone()
        for j in range(len(mine)):
            best = mine[j] - near[j] / (diagonal[start + j] * scale)
            change = best.round_().clamp_(*grid.levels).sub_(mine[j])
            mine[j] += change
            near.addr_(here[:, j], change * scale)
        if len(q) > _PANEL:
            moved = h[:, part] @ ((mine - before) * scale)
            moved[part] = 0
            g += moved


def _zero(q: Tensor, scale: Tensor, zero: Tensor, h: Tensor, g: Tensor, grid: Grid) -> Tensor:
    """The zero points of a unit, changed by one at most in each direction; g follows."""
    ones = h.sum(1)
    for step in (-1, 1):
        other = (zero + step).clamp(*grid.levels)
        change = (zero - other) * scale
        slope, bend = _of_unit(g.sum(0), change), _of_unit(ones.sum().expand(q.shape[1]), change)
        lower = change * (2 * slope + change * bend) < 0
        zero = torch.where(lower, other, zero)
        g += torch.outer(ones, torch.where(lower, change, 0).expand(q.shape[1]))
    return zero


def _scale(p: Tensor, scale: Tensor, h: Tensor, g: Tensor) -> Tensor:
    """The scale of a unit that is best for its integers less zero points, p."""
    slope, bend = _of_unit((g * p).sum(0), scale), _of_unit(((h @ p) * p).sum(0), scale)
    fitted = scale - slope / bend.clamp(min=torch.finfo(bend.dtype).tiny)
    other = half(torch.where(fitted > 0, fitted, scale))
    change = other - scale
    return torch.where(change * (2 * slope + change * bend) < 0, other, scale)


def _of_unit(by_row: Tensor, like: Tensor) -> Tensor:
    """Sums over all rows where one scale is that of all."""
    return by_row.sum().reshape(1) if len(like) == 1 else by_row
