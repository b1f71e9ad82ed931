"""Error-compensated rounding (Frantar et al. 2022, arXiv 2210.17323; Hassibi & Stork 1993).

    minimise     tr (W − Ŵ) H (W − Ŵ)ᵀ,     H = Σ x xᵀ over the calibration inputs of the layer

Columns are rounded in turn. With H⁻¹ = UᵀU (U upper triangular), the error of column j is spread
over the columns that are still to come:

    e_j = (w_j − ŵ_j) / U_jj,       W_k −= e_j U_jk   for k > j

The scale of a block is chosen when its first column comes up, on the weights as they are then,
by the search of scale_search.py with importance 1/U_jj², which is what an error in
column j costs when later columns can make up for it. Updates to columns beyond a panel
are one product at its end.

H gets 1% of its mean diagonal added (damping). A column that was never active has no other
entries in H: it is rounded to nearest, for the real inputs may need it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mptrain.compress.weights.grid import Grid, check_finite, to_levels
from mptrain.compress.weights.records import BlockQuantized
from mptrain.compress.weights.scale_search import best_scales
from mptrain.core.errors import ModelError

DAMPING = 0.01
_PANEL = 128


def factor(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """U of the docstring for a batch of symmetric matrices [..., n, n], in float64.

    Raises ModelError when a matrix is not finite or, even damped, not positive definite.
    """
    h = hessian.double().clone()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal += torch.where(mean > 0, damping * mean, 1.0)
    lower, failed = torch.linalg.cholesky_ex(h)
    if bool(failed.any()) or not bool(h.isfinite().all()):
        raise ModelError(
            "the calibration inputs of a layer are not finite, or their second moments cannot be factorised:"
            " check the model's outputs on the calibration data"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def gptq(weight: Tensor, grid: Grid, upper: Tensor) -> BlockQuantized:
    """The record of a float weight [out, in]; upper: `factor` of its inputs' second moments, [in, in].

    Arithmetic is float64 up to 1024 columns and float32 beyond. Raises ModelError for NaN and infinity.
    """
    check_finite(weight)
    rows, columns = weight.shape
    dtype = torch.float64 if columns <= 1024 else torch.float32
    w, u = weight.to(dtype, copy=True), upper.to(dtype)
    block = grid.block(columns)
    cost = u.diagonal().reciprocal().square().float()
    q = w.new_empty(columns, rows)
    scales, zeros = [], []
    panel = max(block, _PANEL // block * block) if grid.granularity == "block" else min(columns, _PANEL)
    for start in range(0, columns, panel):
        end = min(start + panel, columns)
        part = w[:, start:end].T.contiguous()  # [columns, rows], so that a column is one stretch of memory
        errors = torch.empty_like(part)
        for j in range(start, end):
            here = j - start
            if j % block == 0:
                scale, zero = _unit_scales(part[here : here + block].T if block <= panel else w, grid, cost, j)
                scales.append(scale)
                zeros.append(zero)
                by_row, zero_by_row = scale[:, 0].to(dtype).expand(rows), zero[:, 0].to(dtype).expand(rows)
            q[j] = to_levels(part[here][:, None], by_row, zero_by_row, grid)[:, 0]
            errors[here] = (part[here] - (q[j] - zero_by_row) * by_row) / u[j, j]
            # up to the end of the panel; but the scales of a block need all of its columns
            part[here + 1 :] -= torch.outer(u[j, j + 1 : end], errors[here])
        w[:, end:] -= errors.T @ u[start:end, end:]
    return grid.record(q.T.contiguous(), torch.cat(scales, 1), torch.cat(zeros, 1), weight.shape)


def _unit_scales(columns: Tensor, grid: Grid, cost: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """(scale, zero) [rows | 1, 1] of the units that begin at column `first`; the search is in float32.

    columns: [rows, columns of a unit] as they are now. cost: of an error, by column of the whole weight.
    """
    rows, count = columns.shape
    importance = cost[first : first + count].expand(rows, count)
    shape = (1, 1, -1) if grid.granularity == "tensor" else (rows, 1, count)
    return best_scales(columns.float().reshape(shape), grid, importance.reshape(shape))
