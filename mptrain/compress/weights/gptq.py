"""Error-compensated rounding (Frantar et al. 2022, arXiv 2210.17323; Hassibi & Stork 1993), then descent.

    minimise     tr (W − Ŵ) H (W − Ŵ)ᵀ,     H = Σ x xᵀ over the calibration inputs of the layer

Columns are rounded in turn. With H⁻¹ = UᵀU (U upper triangular), the error of column j is spread
over the columns that are still to come:

    e_j = (w_j − ŵ_j) / U_jj,       W_k −= e_j U_jk   for k > j

The scale of a block is chosen when its first column comes up, on the weights as they are then,
by the search of scale_search.py with importance 1/U_jj², which is what an error in
column j costs when later columns can make up for it. Updates to columns beyond a panel
are one product at its end.

Columns with the largest H_jj come first, for those that follow make up for their errors: blocks by the
sum over their columns, and columns within their block. A block stays one, so nothing of this order is
stored. What is found then goes down further, integers and scales (descent.py): the loss is never above
that of the compensated rounding.

H gets 1% of its mean diagonal added (damping). A column that was never active has no other
entries in H: it is rounded to nearest, for the real inputs may need it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mptrain.compress.weights.descent import Rounded, descend
from mptrain.compress.weights.grid import Grid, check_finite, to_levels
from mptrain.compress.weights.records import BlockQuantized
from mptrain.compress.weights.scale_search import best_scales
from mptrain.core.errors import ModelError

DAMPING = 0.01
SWEEPS = 2
"""of the descent; the first two give most of what many do"""
_PANEL = 128
_EXACT = 512


@dataclass(frozen=True)
class Factored:
    """Second moments of the inputs of a layer, in the order in which its columns are rounded.

    order: int64 [in], of columns. hessian: H of the docstring, damped, float64 [in, in]. upper: its U.
    """

    order: Tensor
    hessian: Tensor
    upper: Tensor


def factor(moments: Tensor, block: int, damping: float = DAMPING) -> list[Factored]:
    """Of each of a batch of symmetric matrices [count, in, in]. block: columns to a scale.

    Raises ModelError when a matrix is not finite or, even damped, not positive definite.
    """
    order = _order(moments, block)
    rows = torch.arange(len(moments), device=moments.device)[:, None, None]
    h = moments.double()[rows, order[:, :, None], order[:, None, :]]
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal += torch.where(mean > 0, damping * mean, 1.0)
    lower, failed = torch.linalg.cholesky_ex(h)
    if bool(failed.any()) or not bool(h.isfinite().all()):
        raise ModelError(
            "the calibration inputs of a layer are not finite, or their second moments cannot be factorised:"
            " check the model's outputs on the calibration data"
        )
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return [Factored(*parts) for parts in zip(order, h, upper, strict=True)]


def _order(moments: Tensor, block: int) -> Tensor:
    """Columns [count, in]: blocks by the sum of their diagonal, each by its own, the largest first."""
    diagonal = moments.diagonal(dim1=-2, dim2=-1).unflatten(-1, (-1, block))
    inner = diagonal.sort(dim=-1, descending=True, stable=True).indices
    outer = diagonal.sum(-1).sort(dim=-1, descending=True, stable=True).indices
    first = outer[..., None] * block
    return (first + inner.gather(1, outer[..., None].expand_as(inner))).flatten(1)


def gptq(weight: Tensor, grid: Grid, known: Factored, sweeps: int = SWEEPS) -> BlockQuantized:
    """The record of a float weight [out, in]; known: `factor` of its inputs' second moments and its grid's block.

    sweeps: of the descent. Arithmetic is float64 up to 512 columns and float32 beyond. Raises ModelError for NaN and
    infinity.
    """
    check_finite(weight)
    dtype = torch.float64 if weight.shape[1] <= _EXACT else torch.float32
    target = weight.to(dtype)[:, known.order].T.contiguous()
    found = _compensated(target, grid, known.upper.to(dtype))
    if sweeps:
        descend(target, known.hessian.to(dtype), found, grid, sweeps)
    back = known.order.argsort()
    units = known.order[:: grid.block(weight.shape[1])].argsort()  # the first columns of blocks lie as the blocks do
    scale, zero = found.scale[units].T, found.zero[units].T
    return grid.record(found.q[back].T, scale, zero, weight.shape)


def _compensated(target: Tensor, grid: Grid, u: Tensor) -> Rounded:
    """target: [in, out], so that a column of the weight is one stretch of memory."""
    columns, rows = target.shape
    w, block = target.clone(), grid.block(columns)
    cost = u.diagonal().reciprocal().square().float()
    q = torch.empty_like(w)
    scales, zeros = [], []
    panel = max(block, _PANEL // block * block) if grid.granularity == "block" else min(columns, _PANEL)
    for start in range(0, columns, panel):
        end = min(start + panel, columns)
        part = w[start:end]
        errors = torch.empty_like(part)
        for j in range(start, end):
            here = j - start
            if j % block == 0:
                scale, zero = _unit_scales(part[here : here + block] if block <= panel else w, grid, cost, j)
                scales.append(scale.to(w.dtype))
                zeros.append(zero.to(w.dtype))
                by_row, zero_by_row = scales[-1].expand(rows), zeros[-1].expand(rows)
            q[j] = to_levels(part[here][:, None], by_row, zero_by_row, grid)[:, 0]
            errors[here] = (part[here] - (q[j] - zero_by_row) * by_row) / u[j, j]
            # up to the end of the panel; but the scales of a block need all of its columns
            part[here + 1 :] -= torch.outer(u[j, j + 1 : end], errors[here])
        w[end:] -= u[start:end, end:].T @ errors
    return Rounded(q, torch.stack(scales), torch.stack(zeros))


def _unit_scales(columns: Tensor, grid: Grid, cost: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """(scale, zero) [rows | 1] of the units that begin at column `first`; the search is in float32.

    columns: [columns of a unit, rows] as they are now. cost: of an error, by column of the whole weight.
    """
    count, rows = columns.shape
    importance = cost[first : first + count].expand(rows, count)
    shape = (1, 1, -1) if grid.granularity == "tensor" else (rows, 1, count)
    scale, zero = best_scales(columns.T.float().reshape(shape), grid, importance.reshape(shape))
    return scale[:, 0], zero[:, 0]
