import itertools

import pytest
import torch

from mptrain.compress.weights.descent import Rounded, descend
from mptrain.compress.weights.gptq import factor, gptq
from mptrain.compress.weights.grid import Grid, half, min_max, to_levels

GRIDS = [Grid(4, granularity, 4, symmetric) for granularity in ("block", "channel", "tensor") for symmetric in (1, 0)]


def problem(rows, columns, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * columns, columns, generator=generator, dtype=dtype)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=dtype)
    weight = torch.randn(rows, columns, generator=generator, dtype=dtype)
    return weight, x.T @ x / len(x)


def nearest(weight, grid):
    units = grid.units(weight)
    scale, zero = min_max(units, grid)
    q = to_levels(units, scale, zero, grid).reshape(weight.shape)
    return Rounded(q.T.contiguous(), scale.T.contiguous(), zero.T.contiguous())


def losses(weight, h, values):
    """By row; values: [in, out]."""
    error = values.T - weight
    return ((error @ h) * error).sum(1)


@pytest.mark.parametrize("grid", GRIDS)
def test_no_sweep_raises_the_loss_of_any_row(grid):
    weight, h = problem(5, 12)
    found = nearest(weight, grid)
    before = losses(weight, h, found.values())
    alone = grid.granularity != "tensor"  # rows that share a scale are one problem
    for _ in range(4):
        descend(weight.T, h, found, grid, 1)
        after = losses(weight, h, found.values())
        assert (after <= before * (1 + 1e-9)).all() if alone else after.sum() <= before.sum() * (1 + 1e-9)
        before = after
    low, high = grid.levels
    assert torch.equal(found.q, found.q.round()) and found.q.min() >= low and found.q.max() <= high
    assert torch.equal(found.scale, half(found.scale)) and (found.scale > 0).all()
    assert before.sum() < 0.8 * losses(weight, h, nearest(weight, grid).values()).sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_single_change_is_better(symmetric):
    """Every level of every integer, the neighbours of every scale in fp16 and of every zero point, tried out."""
    weight, h = problem(3, 8)
    grid = Grid(4, "block", 4, symmetric)
    found = nearest(weight, grid)
    descend(weight.T, h, found, grid, 50)
    reached = losses(weight, h, found.values())

    def lower(changed):
        return (losses(weight, h, changed.values()) < reached * (1 - 1e-9)).any()

    def copy():
        return Rounded(found.q.clone(), found.scale.clone(), found.zero.clone())

    for row, column, level in itertools.product(range(3), range(8), range(grid.levels[0], grid.levels[1] + 1)):
        other = copy()
        other.q[column, row] = level
        assert not lower(other)
    for row, unit, step in itertools.product(range(3), range(2), (-1, 1)):
        other = copy()
        bits = other.scale[unit, row].half().view(torch.int16) + step
        other.scale[unit, row] = bits.view(torch.float16).double()
        assert not lower(other)
        if not symmetric:
            other = copy()
            other.zero[unit, row] = (other.zero[unit, row] + step).clamp(*grid.levels)
            assert not lower(other)


def test_integers_against_all_of_them():
    """Two columns, one scale: never below the best of all 256 pairs, and mostly there."""
    weight, h = problem(40, 2)
    grid = Grid(4, "channel")
    found = nearest(weight, grid)
    descend(weight.T, h, found, grid, 10)
    reached = losses(weight, h, found.values())
    best = torch.full_like(reached, torch.inf)
    for pair in itertools.product(range(-8, 8), repeat=2):
        q = torch.tensor(pair, dtype=weight.dtype)[:, None].expand(2, 40)
        best = torch.minimum(best, losses(weight, h, Rounded(q, found.scale, found.zero).values()))
    assert (reached >= best * (1 - 1e-9)).all()
    assert (reached <= best * (1 + 1e-9)).float().mean() > 0.5


@pytest.mark.parametrize("grid", GRIDS)
def test_panels_change_nothing(grid, monkeypatch):
    def found(panel):
        monkeypatch.setattr("mptrain.compress.weights.descent._PANEL", panel)
        rounded = nearest(weight, grid)
        descend(weight.T, h, rounded, grid, 2)
        return rounded

    weight, h = problem(5, 12)
    whole, pieces = found(128), found(3)
    assert torch.equal(whole.q, pieces.q) and torch.equal(whole.scale, pieces.scale)
    assert torch.equal(whole.zero, pieces.zero)


@pytest.mark.parametrize("columns", [48, 576])
@pytest.mark.parametrize("grid", [Grid(4, "block", 16), Grid(4, "block", 16, False), Grid(4, "channel")])
def test_gptq_ends_at_or_below_compensated_rounding(grid, columns):
    weight, h = problem(16, columns, dtype=torch.float32)
    (known,) = factor(h[None], grid.block(columns))
    plain, better, again = (gptq(weight, grid, known, sweeps) for sweeps in (0, 2, 2))
    damped = known.hessian[known.order.argsort()][:, known.order.argsort()]
    first, last = (losses(weight.double(), damped, r.dense().double().T) for r in (plain, better))
    assert (last <= first * (1 + 1e-4)).all() and last.sum() < 0.97 * first.sum()
    assert torch.equal(better.q, again.q) and torch.equal(better.scale, again.scale)
