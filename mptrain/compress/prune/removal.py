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
over the blocks of a model, and a knapsack can spread a budget over them.

H is damped by `damping` of its mean diagonal, which stands for a prior on small changes. All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

COMPACT = 128
"""units that are removed before the matrices are made smaller"""


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


def half_gram(gram: Tensor) -> Tensor:
    """L [outputs, outputs] with LᵀL = G, for a positive semi-definite G."""
    values, vectors = torch.linalg.eigh(gram.double())
    return (vectors * values.clamp_min(0).sqrt()).T


@torch.no_grad()
def removal(weight: Tensor, covariance: Tensor, gram: Tensor, columns: int, *, damping: float) -> Removal:
    """The order in which units leave, and the loss of every size.

    weight: [outputs, units · columns], the columns of a unit side by side. covariance: H [inputs, inputs].
    gram: G [outputs, outputs]. Equal costs go to the lower unit; the same input gives the same result.
    """
    w = half_gram(gram).to(weight.device) @ weight.double()
    inverse = torch.linalg.inv(damped(covariance, damping))
    step = _channel if columns == 1 else _unit
    alive = torch.arange(weight.shape[1] // columns)
    gone = torch.zeros(len(alive), dtype=torch.bool, device=weight.device)
    order: list[int] = []
    loss = [0.0]
    for number in range(1, len(alive) + 1):
        unit, cost = step(w, inverse, gone, columns)
        gone[unit] = True
        order.append(int(alive[unit]))
        loss.append(loss[-1] + max(cost, 0.0) / 2)
        if number % COMPACT == 0 or columns > 1:
            left = ~gone
            at = left.repeat_interleave(columns)
            w, inverse = w[:, at], inverse[at][:, at]
            alive, gone = alive[left.cpu()], gone[left]
    return Removal(order, np.array(loss))


def _channel(w: Tensor, inverse: Tensor, gone: Tensor, columns: int) -> tuple[int, float]:
    """Remove the cheapest single column, in place."""
    diagonal = inverse.diagonal()
    costs = w.square().sum(0) / diagonal
    costs[gone] = torch.inf
    unit = int(costs.argmin())
    row = inverse[unit].clone()
    w.addr_(w[:, unit] / row[unit], row, alpha=-1.0)
    inverse.addr_(row, row, alpha=-1.0 / float(row[unit]))
    w[:, unit] = 0.0
    inverse[unit, unit] = 1.0  # of a column that is gone: never looked at, and no division by zero
    return unit, float(costs[unit])


def _unit(w: Tensor, inverse: Tensor, gone: Tensor, columns: int) -> tuple[int, float]:
    """Remove the cheapest group of columns, in place; groups that are gone have left the matrices."""
    units = len(gone)
    at = torch.arange(units, device=inverse.device)
    blocks = inverse.view(units, columns, units, columns)[at, :, at, :]  # [units, columns, columns]
    inner = torch.linalg.inv(blocks)
    groups = w.view(-1, units, columns).transpose(0, 1)  # [units, outputs, columns]
    costs = ((groups @ inner) * groups).sum((1, 2))
    unit = int(costs.argmin())
    rows = inverse[unit * columns : (unit + 1) * columns].clone()
    w -= groups[unit].clone() @ inner[unit] @ rows
    inverse -= rows.T @ inner[unit] @ rows
    return unit, float(costs[unit])


@torch.no_grad()
def refit(weight: Tensor, covariance: Tensor, columns: Tensor, *, damping: float) -> Tensor:
    """The best weights [outputs, len(columns)] when only `columns` of the inputs are left, float64.

    They minimise tr((W' - W) H (W' - W)ᵀ) with the damped H, whatever G is. The bias then changes by
    W mean(x) - W' mean(x)[columns].
    """
    w, h = weight.double(), damped(covariance, damping)
    return torch.linalg.solve(h[columns][:, columns], w @ h[:, columns], left=False)
