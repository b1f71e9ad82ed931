"""Bits for every weight so that the model meets a size budget and the loss rises least.

The rise is estimated per weight from the Fisher information F of importance.py,

    cost(record) = Σ F (w - ŵ)²        (twice the second-order term of the loss, summed over batches)

for each candidate record, of integers or of tables. The choice of one record for every weight
is a knapsack: starting from the smallest of each, take again and again the step that saves the
most cost per byte and still fits, over the lower convex hull of each weight's candidates. That
is the optimum of the relaxed problem for the budget it uses, and at most one step from the true one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mptrain.compress.weights.records import Record, stored_bytes
from mptrain.core.errors import UserError


@dataclass(frozen=True)
class Option:
    """bits of a candidate, its bytes on a target, its estimated cost."""

    bits: int
    size: int
    cost: float


@torch.no_grad()
def option(weight: Tensor, record: Record, importance: Tensor) -> Option:
    """What a candidate costs. weight, importance: float, of one shape."""
    error = (weight - record.weight().view_as(weight).to(weight.device)).square_()
    return Option(record.bits, stored_bytes(record), float((importance * error).double().sum()))


def allocate(options: Mapping[str, Sequence[Option]], budget: int, field: str) -> dict[str, Option]:
    """One option for each weight, of at most `budget` bytes together. field: of the recipe, for the error.

    Raises UserError when the smallest of all do not fit.
    """
    hulls = {name: _hull(candidates) for name, candidates in options.items()}
    at = dict.fromkeys(hulls, 0)
    used = sum(hull[0].size for hull in hulls.values())
    if used > budget:
        raise UserError(
            f"{field}: {budget:,} bytes are less than the {used:,} that the fewest bits take; raise it, or let more"
            " weights share a scale or table"
        )
    while True:
        steps = [
            ((hull[at[name]].cost - hull[at[name] + 1].cost) / (hull[at[name] + 1].size - hull[at[name]].size), name)
            for name, hull in hulls.items()
            if at[name] + 1 < len(hull) and used + hull[at[name] + 1].size - hull[at[name]].size <= budget
        ]
        if not steps:
            return {name: hull[at[name]] for name, hull in hulls.items()}
        _, name = max(steps)
        used += hulls[name][at[name] + 1].size - hulls[name][at[name]].size
        at[name] += 1


def _hull(candidates: Sequence[Option]) -> list[Option]:
    """The candidates that are best for some price of a byte, smallest first."""
    hull: list[Option] = []
    for new in sorted(candidates, key=lambda o: (o.size, o.cost)):
        if hull and new.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], new):
            hull.pop()
        hull.append(new)
    return hull


def _gain(small: Option, large: Option) -> float:
    return (small.cost - large.cost) / (large.size - small.size)
