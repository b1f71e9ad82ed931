"""Optimal brain surgeon on blocks small enough to try everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mptrain.compress.prune import removal as obs
from mptrain.compress.prune.removal import Reader, damped, refit

DAMPING = 1e-3


def problem(outputs: int = 5, inputs: int = 8, samples: int = 60, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=draw, dtype=torch.float64)
    x = torch.randn(samples, inputs, generator=draw, dtype=torch.float64) @ mix
    g = torch.randn(samples, outputs, generator=draw, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, generator=draw, dtype=torch.float64)
    return weight, torch.cov(x.T, correction=0), g.T @ g / samples, x, g


def removal(weight, covariance, gram, size, *, damping):
    return obs.removal([Reader(weight, covariance, gram)], weight.shape[1] // size, damping=damping)


def loss_of(weight, covariance, gram, columns):
    """½ tr(G ΔW H ΔWᵀ) of the best weights on `columns`, by plain algebra."""
    change = -weight.clone()
    change[:, columns] += refit(weight, covariance, columns, damping=DAMPING)
    return 0.5 * float(torch.trace(gram @ change @ damped(covariance, DAMPING) @ change.T))


def columns_of(units, size):
    return torch.tensor([u * size + i for u in units for i in range(size)], dtype=torch.long)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_step_takes_the_unit_that_costs_least_and_states_its_loss(size):
    weight, covariance, gram, *_ = problem()
    found = removal(weight, covariance, gram, size, damping=DAMPING)
    units = weight.shape[1] // size
    assert sorted(found.order) == list(range(units)) and found.loss[0] == 0.0
    left = set(range(units))
    for number, unit in enumerate(found.order[:-1], 1):
        losses = {u: loss_of(weight, covariance, gram, columns_of(sorted(left - {u}), size)) for u in left}
        assert unit == min(losses, key=losses.get)
        assert found.loss[number] == pytest.approx(losses[unit], rel=1e-9)
        left.remove(unit)
    assert found.loss[-1] == pytest.approx(
        0.5 * float(torch.trace(gram @ weight @ damped(covariance, DAMPING) @ weight.T)), rel=1e-9
    )
    assert (np.diff(found.loss) >= 0).all()


def test_greedy_is_near_the_best_of_all_subsets():
    weight, covariance, gram, *_ = problem(inputs=9, seed=3)
    found = removal(weight, covariance, gram, 1, damping=DAMPING)
    for count in range(1, 9):
        best = min(
            loss_of(weight, covariance, gram, torch.tensor(units)) for units in itertools.combinations(range(9), count)
        )
        assert best <= found.loss[9 - count] * (1 + 1e-9)
        assert found.loss[9 - count] <= 1.25 * best


def test_the_loss_is_exact_for_a_quadratic_loss():
    """L = ½ mean ‖A (y - y₀)‖² over samples has its Hessian in y as G, and x is centred: nothing is approximate."""
    weight, _, _, x, g = problem(samples=200)
    x = x - x.mean(0)
    a = g[:5]
    covariance, gram = x.T @ x / len(x), a.T @ a
    found = removal(weight, covariance, gram, 2, damping=1e-12)
    kept = columns_of(found.kept(2), 2)
    new = refit(weight, covariance, kept, damping=1e-12)
    error = (x[:, kept] @ new.T - x @ weight.T) @ a.T
    assert found.loss[2] == pytest.approx(0.5 * float(error.square().sum(1).mean()), rel=1e-6)


def test_units_of_a_rotated_basis_within_units_are_the_same():
    """A head's inner basis is arbitrary: rotating it changes neither order nor loss."""
    weight, covariance, gram, *_ = problem(inputs=12)
    turn = torch.block_diag(*(torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0] for _ in range(3)))
    plain = removal(weight, covariance, gram, 4, damping=DAMPING)
    turned = removal(weight @ turn, turn.T @ covariance @ turn, gram, 4, damping=DAMPING)
    assert turned.order == plain.order
    np.testing.assert_allclose(turned.loss, plain.loss, rtol=1e-9)


def test_a_rotated_output_basis_is_the_same():
    weight, covariance, gram, *_ = problem()
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    plain = removal(weight, covariance, gram, 1, damping=DAMPING)
    turned = removal(turn @ weight, covariance, turn @ gram @ turn.T, 1, damping=DAMPING)
    assert turned.order == plain.order
    np.testing.assert_allclose(turned.loss, plain.loss, rtol=1e-9)


def test_a_channel_that_others_can_stand_in_for_goes_first_for_nothing():
    weight, _, gram, x, _ = problem()
    x[:, 3] = x[:, 0] + 0.5 * x[:, 1]
    weight[:, 3] *= 100  # the largest by any measure of one channel
    found = removal(weight, torch.cov(x.T, correction=0), gram, 1, damping=1e-9)
    assert found.order[0] in (0, 1, 3)
    assert found.loss[1] < 1e-5 * found.loss[-1]


def test_many_channels_with_compaction_agree_with_the_direct_solution():
    weight, covariance, gram, *_ = problem(outputs=6, inputs=300, samples=900)
    found = removal(weight, covariance, gram, 1, damping=DAMPING)
    for count in (10, 100, 200):
        direct = loss_of(weight, covariance, gram, torch.tensor(found.kept(count)))
        assert found.loss[300 - count] == pytest.approx(direct, rel=1e-6)
    again = removal(weight, covariance, gram, 1, damping=DAMPING)
    assert again.order == found.order and (again.loss == found.loss).all()


def test_inputs_that_never_change_are_free():
    weight, covariance, gram, *_ = problem()
    covariance[2], covariance[:, 2] = 0.0, 0.0
    found = removal(weight, covariance, gram, 1, damping=DAMPING)
    assert found.order[0] == 2 and found.loss[1] < 1e-2 * found.loss[2]
    none = removal(weight, torch.zeros_like(covariance), gram, 1, damping=DAMPING)
    assert np.isfinite(none.loss).all()


@pytest.mark.parametrize("size", [1, 2])
def test_units_that_several_maps_read_cost_the_sum_of_what_they_cost_each(size):
    parts = [problem(seed=seed)[:3] for seed in (0, 1, 2)]
    units = 8 // size
    found = obs.removal([Reader(*part) for part in parts], units, damping=DAMPING)
    left = set(range(units))
    for number, unit in enumerate(found.order[:-1], 1):
        losses = {u: sum(loss_of(*part, columns_of(sorted(left - {u}), size)) for part in parts) for u in left}
        assert unit == min(losses, key=losses.get)
        assert found.loss[number] == pytest.approx(losses[unit], rel=1e-9)
        left.remove(unit)
