"""Removing inputs of a linear map one unit at a time, each time at the least loss (optimal brain surgeon).

For y = W x + b, weights [outputs, inputs], a change ΔW raises the loss by about

    ½ tr(G ΔW H ΔWᵀ),   H = covariance of x [inputs, inputs],   G = Gram of ∂L/∂y [outputs, outputs]

(a Kronecker-factored curvature, Martens and Grosse 2015; the bias takes up the mean of x, hence the covariance).
A unit S is a set of columns. To set them to zero while all other weights answer as well as they can costs

    ½ tr(G W_S ((H⁻¹)_SS)⁻¹ W_Sᵀ),   and then   W ← W - W_S ((H⁻¹)_SS)⁻¹ (H⁻¹)_S,
                                            H⁻¹ ← H⁻¹ - (H⁻¹)_Sᵀ ((H⁻¹)_SS)⁻¹ (H⁻¹)_S

(Hassibi and Stork 1993; for whole units Kurtic et al. 2023, arXiv 2302.04089). The cheapest unit goes first, and so
on until none is left: one pass gives the order and the loss at every size. G weighs the errors of a unit but does
not move the optimal weights, so those of any size come from one ridge regression. Losses are absolute: they add up
over the blocks of a model, and a knapsack can spread a budget over them. Where several maps read the same units (the
heads of all layers that share a table of relative positions), a unit costs the sum, and leaves all of them.

Only P = H⁻¹ and C = WᵀGW are kept: the cost of S is ½ tr(C_SS (P_SS)⁻¹), and with A = (P_SS)⁻¹ P_S

    P ← P - AᵀP_S
    C ← C - AᵀB - BᵀA,    B = C_S - ½ C_SS A

whose rows are gathered and applied when `COMPACT` columns have gone, so that a step costs as much as its own rows and
not as the matrices (as GPTQ gathers its updates, Frantar et al. 2022). H is damped by `damping` of its mean diagonal,
which stands for a prior on small changes. All in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

COMPACT = 128
"""columns that are removed before the matrices are brought up to date and made smaller"""


@dataclass(frozen=True)
class Reader:
    """A linear map that reads units: weight [outputs, units · columns], the columns of a unit side by side; covariance
    H of its inputs [inputs, inputs]; gram G of the gradients at its outputs [outputs, outputs]."""

    weight: Tensor
    covariance: Tensor
    gram: Tensor


@dataclass(frozen=True)
class Removal:
    """order: units, first removed first. loss: float64 [units + 1], after as many removals; loss[0] is 0."""

    order: list[int]
    loss: np.ndarray

    def kept(self, count: int) -> list[int]:
        """The units that are left when `count` are, ascending."""
        return sorted(self.order[len(self.order) - count :])

    def value(self) -> np.ndarray:
        """[units + 1] by how many units stay: minus the loss."""
        return -self.loss[::-1]


def damped(covariance: Tensor, damping: float) -> Tensor:
    """H + damping · mean(diag H) · I, in float64; inputs that never change get the same."""
    h = covariance.double().clone()
    mean = float(h.diagonal().mean())
    h.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return h


@torch.no_grad()
def removal(readers: Sequence[Reader], units: int, *, damping: float) -> Removal:
    """The order in which units leave, and the loss of every size.

    readers: of the same `units`, one or more. Equal costs go to the lower unit; the same input gives the same result.
    """
    left = [_Left(reader, units, damping) for reader in readers]
    alive = torch.arange(units)
    gone = torch.zeros(units, dtype=torch.bool, device=left[0].p.device)
    order: list[int] = []
    loss = [0.0]
    for _ in range(units):
        costs = sum(part.costs() for part in left)
        costs = torch.where(gone, torch.inf, costs)
        unit = int(costs.argmin())
        loss.append(loss[-1] + max(float(costs[unit]), 0.0) / 2)
        order.append(int(alive[unit]))
        gone[unit] = True
        for part in left:
            part.remove(unit)
        if max(part.rows for part in left) >= COMPACT:
            stay = ~gone
            for part in left:
                part.compact(stay)
            alive, gone = alive[stay.cpu()], gone[stay]
    return Removal(order, np.array(loss))


class _Left:
    """What is left of one map: P and C as of the last `compact`, and the rows that have been gathered since."""

    def __init__(self, reader: Reader, units: int, damping: float) -> None:
        weight = reader.weight.double()
        self.size = weight.shape[1] // units
        self.p = torch.linalg.inv(damped(reader.covariance, damping))
        self.c = weight.T @ (reader.gram.double().to(weight.device) @ weight)
        self.rows = 0
        self.q = self.a = self.b = self.p.new_empty(0, len(self.p))
        self.compact(torch.ones(units, dtype=torch.bool, device=self.p.device))

    def costs(self) -> Tensor:
        """tr(C_SS (P_SS)⁻¹) of every unit: [units]."""
        if self.size == 1:
            return (self.c_own / self.p_own).flatten()
        return (self.c_own * torch.linalg.inv(self.p_own)).sum((1, 2))

    def remove(self, unit: int) -> None:
        at = slice(unit * self.size, (unit + 1) * self.size)
        q, a, b = (gathered[: self.rows] for gathered in (self.q, self.a, self.b))
        p = self.p[at] - a[:, at].T @ q
        c = self.c[at] - a[:, at].T @ b - b[:, at].T @ a
        rows = slice(self.rows, self.rows + self.size)
        self.q[rows] = p
        self.a[rows] = torch.linalg.solve(p[:, at], p)
        self.b[rows] = c - c[:, at] @ self.a[rows] / 2
        self.rows += self.size
        q, a, b = (self._own(gathered[rows]) for gathered in (self.q, self.a, self.b))
        self.p_own -= a.mT @ q
        change = a.mT @ b
        self.c_own -= change + change.mT
        self.p_own[unit] = torch.eye(self.size, dtype=p.dtype, device=p.device)  # gone: no division by zero

    def compact(self, stay: Tensor) -> None:
        """Apply what was gathered, and leave out units that have gone. stay: bool [units]."""
        q, a, b = (gathered[: self.rows] for gathered in (self.q, self.a, self.b))
        self.p -= a.T @ q
        change = a.T @ b
        self.c -= change + change.T
        at = stay.repeat_interleave(self.size)
        self.p, self.c = self.p[at][:, at], self.c[at][:, at]
        self.rows = 0
        self.q, self.a, self.b = (self.p.new_empty(COMPACT + self.size, len(self.p)) for _ in range(3))
        units = torch.arange(int(stay.sum()), device=self.p.device)
        shape = (len(units), self.size, len(units), self.size)
        self.p_own = self.p.view(shape)[units, :, units, :].clone()  # [units, size, size]
        self.c_own = self.c.view(shape)[units, :, units, :].clone()

    def _own(self, rows: Tensor) -> Tensor:
        """[rows, units · size] as [units, rows, size]."""
        return rows.view(len(rows), -1, self.size).transpose(0, 1)


@torch.no_grad()
def refit(weight: Tensor, covariance: Tensor, columns: Tensor, *, damping: float) -> Tensor:
    """The best weights [outputs, len(columns)] when only `columns` of the inputs are left, float64.

    They minimise tr((W' - W) H (W' - W)ᵀ) with the damped H, whatever G is. The bias then changes by
    W mean(x) - W' mean(x)[columns].
    """
    w, h = weight.double(), damped(covariance, damping)
    return torch.linalg.solve(h[columns][:, columns], w @ h[:, columns], left=False)
