"""Which units to keep under a budget: a multiple-choice knapsack.

Every block picks how many units n it keeps; with n it keeps its n most important ones:

    maximise   Σ_blocks value_b(n_b),   value_b(n) = sum of the n largest importances of b, or minus the loss with n
    subject to Σ_blocks cost_b(n_b) ≤ keep · Σ_blocks cost_b(all)

Solved by dynamic programming over the cost. Whole-number costs with few distinct sums are
exact; others are rounded up to `CELLS` cells (so the budget always holds) and what rounding
left over is then filled greedily. n is at least the floor of the recipe, and an FFN width is
a multiple of `round_ffn` (and of what the target is fast at) or the full width; a block that
may be left out whole (dropped.py) may have n = 0 too, as long as not all of them have.

A budget of the whole exported model has a constant besides the blocks, which pruning does not
touch; it is part of both sides. `correct` takes what the target then measured into account.

Where two blocks cut one parameter, a convolution's inputs and outputs, costs do not add up (crossings.py): the sum
above is then the largest whose real cost holds the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np

from mptrain.compress.structure import costs
from mptrain.compress.structure.blocks import Block, Kept, Structure
from mptrain.compress.structure.crossings import Crossings, Weight
from mptrain.core.errors import UserError
from mptrain.recipe import Keep

CELLS = 8192
TRIES = 10
"""of budgets, where blocks cut the same parameters"""

Importance = Mapping[str, np.ndarray]
"""Non-negative importance of every unit, by name of the block: [units]."""


CostOf = Callable[[Block, int], float]


@dataclass(frozen=True)
class _Choice:
    """A block and how many units it may keep, ascending, with the cost of each choice."""

    block: Block
    counts: np.ndarray  # int64 [choices]
    cost: np.ndarray  # float64 [choices]


@dataclass(frozen=True)
class Widths:
    """How many units of a block may stay: floors, and what an FFN width is a multiple of. drop: names of the blocks
    that may also be left out."""

    min_heads: int = 1
    min_ffn: int = 1
    round_ffn: int = 1
    step: Callable[[Block], int] = lambda block: 1
    drop: frozenset[str] = frozenset()

    def allowed(self, block: Block) -> np.ndarray:
        """Ascending, int64; all units are the last."""
        some = self._some(block)
        return np.array([0, *some] if block.name in self.drop else some, dtype=np.int64)

    def _some(self, block: Block) -> list[int]:
        floor, step = (self.min_heads, 1) if block.kind == "heads" else (self.min_ffn, self.round_ffn)
        step = math.lcm(step, block.step, self.step(block))
        first = math.ceil(min(floor, block.units) / step) * step
        return [*range(first, block.units, step), block.units]

    def least(self, structure: Structure) -> Kept:
        """As little of every block that may be cut as may stay of one that is not left out."""
        return Kept({block.name: list(range(self._some(block)[0])) for block in structure.prunable()})


@dataclass(frozen=True)
class _Limit:
    """One budget: what the model costs when all is kept, and the fraction to keep."""

    name: str
    keep: float
    cost_of: CostOf
    blocks: list[Block]
    constant: float  # of what is no block
    total: float
    fixed: float  # cost of what may not be pruned
    choices: list[_Choice]
    crossings: Crossings

    @property
    def least(self) -> float:
        """The least share that can stay; where all blocks may be left out, of the cheapest one its least units do."""
        least = self.cost({choice.block.name: int(choice.counts[0]) for choice in self.choices})
        if len(self.choices) == len(self.blocks) and not any(choice.counts[0] for choice in self.choices):
            least += min(float(choice.cost[1] - choice.cost[0]) for choice in self.choices)
        return least / self.total

    @property
    def of_blocks(self) -> float:
        """The fraction of the blocks alone that stays."""
        return (self.keep * self.total - self.constant) / (self.total - self.constant)

    def cost(self, counts: Mapping[str, int]) -> float:
        """counts: of units that stay, by name of the block; other blocks are whole."""
        shares = sum(self.cost_of(block, counts.get(block.name, block.units)) for block in self.blocks)
        return self.constant + shares - self.crossings.more(counts)

    def solved(self, values: list[np.ndarray], budget: float) -> list[int]:
        """`_solve` with what crossings leave beyond the shares used up as well, by bisection. budget: of the cost."""
        picked = _solve(self.choices, values, budget - self.fixed)
        low, high = budget, self.total
        for _ in range(TRIES if self.crossings and low < high else 0):
            middle = (low + high) / 2
            tried = _solve(self.choices, values, middle - self.fixed)
            counts = {c.block.name: int(c.counts[p]) for c, p in zip(self.choices, tried)}
            if self.cost(counts) <= budget * (1 + 1e-12):
                low, picked = middle, tried
            else:
                high = middle
        return picked


class Budget:
    """The budget of a recipe on a structure.

    length: sequence length or extents, for MACs. whole: what the exported model costs, needed
    for keep.latency and keep.size. drop: names of blocks that may be left out. Raises UserError
    when not even the floors fit the budget.
    """

    def __init__(
        self,
        structure: Structure,
        keep: Keep,
        *,
        min_heads: int = 1,
        min_ffn: int = 1,
        round_ffn: int = 1,
        length: costs.Length = 128,
        whole: costs.Whole | None = None,
        drop: frozenset[str] = frozenset(),
    ) -> None:
        self.structure = structure
        self.widths = Widths(min_heads, min_ffn, round_ffn, drop=drop)
        if whole is not None:
            self.widths = replace(self.widths, step=whole.step)
        if keep.heads is not None and keep.ffn is not None:
            parts: list[tuple[str, float, list[Block]]] = [
                ("heads", keep.heads, structure.of_kind("heads")),
                ("ffn", keep.ffn, structure.of_kind("ffn", "channels")),
            ]
            self.limits = [self._limit(*part, lambda block, n: n) for part in parts if part[2]]
            return
        every = structure.by_kind()
        if keep.encoder_params is not None:
            limit = self._limit("encoder_params", keep.encoder_params, every, costs.params, costs.params_of)
        elif keep.macs is not None:
            limit = self._limit(
                "macs",
                keep.macs,
                every,
                lambda block, n: costs.macs(block, n, length),
                lambda block, axis: costs.macs_of(block, axis, length),
            )
        else:
            asked = keep.of_export()
            assert asked is not None
            name, share = asked
            if whole is None:
                raise UserError(
                    f"prune.keep.{name} needs what the whole model costs on its target: give `whole`, of"
                    " mptrain.compress.prune.measured.measure"
                )
            limit = self._limit(name, share, every, whole.of, whole.weight, whole.constant)
        self.limits = [limit]

    def search(self, importance: Importance, ease: float = 1.0) -> Kept:
        """The best units to keep.

        ease: 0 keeps all, 1 is the budget, between them the fraction 1 - ease · (1 - keep).
        Ties go to the lower unit index; the same input always gives the same result.
        """
        counts = self.counts(lambda block: _sums(block, importance[block.name]), ease)
        order = {name: np.argsort(-importance[name], kind="stable") for name in counts}
        return Kept({name: sorted(order[name][:count].tolist()) for name, count in counts.items()})

    def counts(self, value: Callable[[Block], np.ndarray], ease: float = 1.0) -> dict[str, int]:
        """How many units of each block to keep, by name.

        value: of a block [units + 1], by how many units stay; it does not fall with their number.
        """
        found = {}
        for limit in self.limits:
            budget = (1.0 - ease * (1.0 - limit.keep)) * limit.total
            values = [value(choice.block)[choice.counts] for choice in limit.choices]
            for choice, picked in zip(limit.choices, limit.solved(values, budget)):
                found[choice.block.name] = int(choice.counts[picked])
        return found

    def fraction(self, kept: Kept) -> dict[str, float]:
        """Cost of `kept` as a fraction of the whole, for each budget."""
        return {
            limit.name: limit.cost({block.name: kept.count(block) for block in limit.blocks}) / limit.total
            for limit in self.limits
        }

    def correct(self, asked: float, seen: Sequence[tuple[Kept, float]]) -> None:
        """Keep as much more or less as it takes to be left with `asked`, now that choices were measured. seen: each
        with the fraction of the whole that it was measured to cost.

        Between two that lie around `asked`, what is measured is taken to be linear in what is predicted; else what the
        blocks were predicted to cost is taken to be off by one factor, of at most 2, as it was for the nearest.
        """
        (limit,) = self.limits
        constant = limit.constant / limit.total
        points = [(self.fraction(kept)[limit.name], measured) for kept, measured in seen]
        below = max((point for point in points if point[1] <= asked), default=None)
        above = min((point for point in points if point[1] > asked), default=None)
        if below and above and below[0] < above[0]:
            keep = below[0] + (above[0] - below[0]) * (asked - below[1]) / (above[1] - below[1])
        else:
            predicted, measured = min(points, key=lambda point: abs(point[1] - asked))
            factor = min(2.0, max(0.5, (measured - constant) / (predicted - constant))) if predicted > constant else 1.0
            keep = constant + (asked - constant) / factor
        self.limits = [replace(limit, keep=min(1.0, max(keep, limit.least)))]

    def round_up(self, block: Block, count: int) -> int:
        """The smallest allowed number of units that is not below `count`."""
        allowed = self.widths.allowed(block)
        return int(allowed[np.searchsorted(allowed, count)])

    def _limit(
        self,
        name: str,
        keep: float,
        blocks: list[Block],
        cost_of: CostOf,
        weight: Weight = lambda block, axis: 0.0,
        constant: float = 0.0,
    ) -> _Limit:
        total = constant + float(sum(cost_of(block, block.units) for block in blocks))
        fixed = constant + float(sum(cost_of(block, block.units) for block in blocks if not block.prunable))
        choices = []
        for block in blocks:
            if block.prunable:
                counts = self.widths.allowed(block)
                cost = np.array([cost_of(block, int(n)) for n in counts], dtype=np.float64)
                choices.append(_Choice(block, counts, cost))
        crossings = Crossings(blocks, weight)
        limit = _Limit(name, keep, cost_of, blocks, constant, total, fixed, choices, crossings)
        if limit.least > keep * (1 + 1e-12):
            self._refuse(limit)
        return limit

    def _refuse(self, limit: _Limit) -> NoReturn:
        widths, step = self.widths, max(block.step for block in limit.blocks)
        kernels = f", kernels that take {step} channels at once" if step > 1 else ""
        rest = limit.constant / limit.total
        outside = f" ({rest:.2g} of it embeddings, norms and head, which are not pruned)" if rest >= 0.01 else ""
        if widths.drop:
            outside += ", though blocks may be left out: less would leave no block at all"
        way_out = "Raise the budget or lower the floors"
        if not widths.drop:
            way_out = "Raise the budget, lower the floors, or let whole blocks go (method: curvature, drop: true)"
        raise UserError(
            f"prune.keep.{limit.name}: {limit.keep:g} cannot be reached: with min_heads {widths.min_heads}, min_ffn"
            f" {widths.min_ffn}, round_ffn {widths.round_ffn}{kernels} and the ignored layers at least"
            f" {math.ceil(limit.least * 1000) / 1000:g} stays{outside}. {way_out}."
        )


def _sums(block: Block, importance: np.ndarray) -> np.ndarray:
    """Sum of the most important units, by their number, float64 [units + 1]."""
    if importance.shape != (block.units,) or not (importance >= 0).all():
        raise ValueError(f"{block.name}: importance must be {block.units} numbers ≥ 0")
    return np.concatenate([[0.0], np.cumsum(np.sort(importance.astype(np.float64))[::-1])])


def _solve(choices: list[_Choice], values: list[np.ndarray], budget: float) -> list[int]:
    """Index of the picked choice of every block; the sum of costs is at most `budget` (floors always fit)."""
    extra = [c.cost - c.cost[0] for c in choices]
    slack = max(0.0, budget - sum(c.cost[0] for c in choices)) * (1 + 1e-12)
    weights, cells = _cells(extra, slack)
    best = np.zeros(cells + 1)
    picks = np.zeros((len(choices), cells + 1), dtype=np.int32)
    for b, (weight, value) in enumerate(zip(weights, values)):
        new = np.full(cells + 1, -np.inf)
        for j, (w, v) in enumerate(zip(weight.tolist(), value.tolist())):
            if w <= cells:
                candidate = best[: cells + 1 - w] + v
                better = candidate > new[w:]
                new[w:][better] = candidate[better]
                picks[b, w:][better] = j
        best = new
    at, picked = cells, [0] * len(choices)
    for b in reversed(range(len(choices))):
        picked[b] = int(picks[b, at])
        at -= int(weights[b][picked[b]])
    _fill(extra, values, picked, slack)
    return picked


def _cells(extra: list[np.ndarray], slack: float) -> tuple[list[np.ndarray], int]:
    """Costs as whole cells, rounded up, and how many cells the slack has."""
    everything = np.concatenate(extra)
    full = sum(float(e[-1]) for e in extra)
    if slack >= full:
        return [np.zeros(len(e), dtype=np.int64) for e in extra], 0
    if (everything == np.round(everything)).all():
        step = float(np.gcd.reduce(everything.astype(np.int64)))
        if slack / step <= CELLS:
            return [(e / step).astype(np.int64) for e in extra], int(slack / step)
    step = slack / CELLS or 1.0
    return [np.ceil(e / step - 1e-9).astype(np.int64) for e in extra], CELLS if slack else 0


def _fill(extra: list[np.ndarray], values: list[np.ndarray], picked: list[int], slack: float) -> None:
    """Spend what is left, best value for its cost first."""
    left = slack - sum(e[p] for e, p in zip(extra, picked))
    while True:
        best, found = -1.0, -1
        for b, p in enumerate(picked):
            if p + 1 < len(extra[b]) and (cost := extra[b][p + 1] - extra[b][p]) <= left:
                gain = (values[b][p + 1] - values[b][p]) / cost if cost > 0 else np.inf
                if gain > best:
                    best, found = gain, b
        if found < 0:
            return
        left -= extra[found][picked[found] + 1] - extra[found][picked[found]]
        picked[found] += 1
