"""k-means of numbers against the exact optimum by brute force, on both implementations."""

import numpy as np
import pytest
import torch

from mptrain.compress.weights.kmeans import cluster
from mptrain.core import native

BOTH = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])


def draw(kind, groups=4, n=400, seed=0):
    rng = np.random.default_rng(seed)
    values = {
        "gauss": lambda: 0.02 * rng.standard_normal((groups, n)),
        "heavy": lambda: 0.02 * rng.standard_t(3, (groups, n)),
        "tiny": lambda: 1e-7 * rng.standard_normal((groups, n)),
        "offset": lambda: 1 + 1e-3 * rng.standard_normal((groups, n)),
        "outlier": lambda: np.where(rng.random((groups, n)) < 0.01, 1e4, 1) * rng.standard_normal((groups, n)),
        "pruned": lambda: np.where(rng.random((groups, n)) < 0.6, 0, rng.standard_normal((groups, n))),
        "bimodal": lambda: rng.choice([-1, 1], (groups, n)) + 0.01 * rng.standard_normal((groups, n)),
    }[kind]()
    return torch.from_numpy(values.astype(np.float32))


def importance(kind, shape, seed=1):
    rng = np.random.default_rng(seed)
    weights = {
        "even": lambda: None,
        "uneven": lambda: rng.random(shape) ** 4,
        "fisher": lambda: rng.lognormal(0, 3, shape) * 1e-12,
        "zeros": lambda: np.where(rng.random(shape) < 0.5, 0, rng.random(shape)),
    }[kind]()
    return None if weights is None else torch.from_numpy(weights.astype(np.float32))


def loss(values, table, indices, weights=None):
    """Weighted sum of squares of each group, float64."""
    errors = (values.double() - table.double().gather(1, indices.long())).square()
    return (errors if weights is None else errors * weights.double()).sum(1)


def optimum(values, clusters, weights=None):
    """The exact minimum for one group: dynamic programming over all boundaries, float64."""
    x, order = values.double().sort()
    w = torch.ones_like(x) if weights is None else weights.double()[order]
    x = x - (w * x).sum() / w.sum()
    W, M, S = (torch.nn.functional.pad(t.cumsum(0), (1, 0)) for t in (w, w * x, w * x * x))
    weight, moment, square = (t[None, :] - t[:, None] for t in (W, M, S))  # [start, end]
    cost = (square - moment**2 / weight.clamp_min(1e-300)).clamp_min(0).masked_fill(weight <= 0, 0.0)
    cost = cost.masked_fill(torch.ones_like(cost, dtype=torch.bool).tril(-1), torch.inf)
    total = cost[0]
    for _ in range(clusters - 1):
        total = (total[:, None] + cost).amin(0)
    return float(total[-1])


@BOTH
@pytest.mark.parametrize("weights", ["even", "uneven", "fisher", "zeros"])
@pytest.mark.parametrize("kind", ["gauss", "heavy", "tiny", "offset", "outlier", "pruned", "bimodal"])
def test_the_sum_of_squares_is_within_a_promille_of_the_exact_minimum(kind, weights, compiled):
    values = draw(kind)
    heavy = importance(weights, values.shape)
    for bits in (1, 2, 4):
        table, indices = cluster(values, bits, heavy, compiled=compiled)
        found = loss(values, table, indices, heavy)
        for group in range(len(values)):
            best = optimum(values[group], 2**bits, None if heavy is None else heavy[group])
            rounding = 1e-12 * float((values[group].double() ** 2 * (1 if heavy is None else heavy[group])).sum())
            limit = 1.0005 if heavy is None else 1.005
            assert float(found[group]) <= best * limit + rounding, (bits, group, float(found[group]) / best)


@BOTH
@pytest.mark.parametrize("weights", ["even", "fisher"])
def test_larger_groups_where_cells_hold_many_values(weights, compiled):
    values = draw("heavy", groups=2, n=1200)
    heavy = importance(weights, values.shape)
    table, indices = cluster(values, 3, heavy, compiled=compiled)
    for group, found in enumerate(loss(values, table, indices, heavy)):
        best = optimum(values[group], 8, None if heavy is None else heavy[group])
        assert float(found) <= best * (1.0005 if heavy is None else 1.005)


@pytest.mark.parametrize(("bits", "n", "groups"), [(2, 1000, [407, 438, 457, 654]), (3, 500, [175, 895])])
def test_few_bits_are_exact(bits, n, groups):
    """Groups with a second valley about as deep, which 256 cells mistake for the deepest."""
    values = draw("heavy", groups=1000, n=n)
    heavy = importance("uneven", values.shape)[groups]
    values = values[groups]
    for group, found in enumerate(loss(values, *cluster(values, bits, heavy), heavy)):
        assert float(found) <= optimum(values[group], 2**bits, heavy[group]) * (1 + 2e-6)


@pytest.mark.parametrize("weights", ["even", "uneven"])
@pytest.mark.parametrize("kind", ["gauss", "offset", "outlier"])
def test_a_group_too_large_to_sort_is_clustered_as_well(kind, weights):
    values = draw(kind, groups=1, n=150_000)
    heavy = importance(weights, values.shape)
    histogram, sorting = (loss(values, *cluster(values, 4, heavy, compiled=c), heavy) for c in (True, False))
    assert float(histogram) <= float(sorting) * 1.0005


def test_a_large_group_of_few_values_is_exact():
    few = draw("heavy", groups=1, n=300)
    counts = torch.randint(1, 1000, few.shape)
    values = few[0].repeat_interleave(counts[0])[torch.randperm(int(counts.sum()))][None]
    table, indices = cluster(values, 4)
    assert values.shape[1] > 2**17
    assert float(loss(values, table, indices)) <= optimum(few[0], 16, counts[0].float()) * 1.00001


@pytest.mark.parametrize(("bits", "compiled"), [(6, True), (6, False), (8, True)])
def test_many_clusters(bits, compiled):
    values = draw("gauss", groups=1, n=1000)
    table, indices = cluster(values, bits, compiled=compiled)
    for group, found in enumerate(loss(values, table, indices)):
        assert float(found) <= optimum(values[group], 2**bits) * (1.0005 if compiled else 1.02) + 1e-12


@BOTH
@pytest.mark.parametrize("distinct", [1, 2, 7, 16])
def test_no_more_distinct_values_than_clusters_is_lossless(distinct, compiled):
    levels = torch.randn(3, distinct)
    values = levels.gather(1, torch.randint(distinct, (3, 500)))
    table, indices = cluster(values, 4, torch.rand_like(values), compiled=compiled)
    assert torch.equal(table.gather(1, indices.long()), values)
    assert bool((table.diff(dim=1) >= 0).all()) and bool(torch.isfinite(table).all())


@BOTH
def test_indices_name_the_nearest_centroid(compiled):
    values = draw("heavy")
    table, indices = cluster(values, 4, importance("fisher", values.shape), compiled=compiled)
    distance = (values[..., None] - table[:, None, :]).abs()
    chosen = distance.gather(2, indices.long()[..., None]).squeeze(2)
    assert table.dtype == torch.float32 and indices.dtype == torch.uint8
    assert bool((chosen <= distance.amin(2) * 1.0001 + 1e-9).all())


@BOTH
def test_weights_that_are_all_zero_count_every_value_alike(compiled):
    values = draw("gauss")
    plain, zero = (cluster(values, 3, w, compiled=compiled) for w in (None, torch.zeros_like(values)))
    assert torch.equal(plain[1], zero[1])
    torch.testing.assert_close(plain[0], zero[0])


@BOTH
def test_extreme_magnitudes(compiled):
    for scale in (1e-38, 1e30, 3e37):
        values = scale * draw("gauss") / 0.1
        for weights in (None, torch.rand_like(values) * 1e-38, torch.rand_like(values) * 1e38):
            table, _ = cluster(values, 4, weights, compiled=compiled)
            assert bool(torch.isfinite(table).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types(dtype):
    values = draw("gauss").to(dtype)
    table, indices = cluster(values, 4)
    expected = cluster(values.float(), 4)
    assert torch.equal(table, expected[0]) and torch.equal(indices, expected[1])


@BOTH
def test_groups_are_independent_and_repeatable(compiled):
    values, weights = draw("heavy", groups=12), importance("uneven", (12, 400))
    first = cluster(values, 4, weights, compiled=compiled)
    try:
        torch.set_num_threads(2)
        again = cluster(values, 4, weights, compiled=compiled)
    finally:
        torch.set_num_threads(1)
    alone = cluster(values[5:6], 4, weights[5:6], compiled=compiled)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert torch.equal(first[0][5:6], alone[0]) and torch.equal(first[1][5:6], alone[1])


@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_an_error(bad, compiled):
    values = draw("gauss")
    values[1, 7] = bad
    with pytest.raises(ValueError, match="values must be finite: 1 of 1600"):
        cluster(values, 4, compiled=compiled)
    with pytest.raises(ValueError, match="weights must be finite"):
        cluster(draw("gauss"), 4, values, compiled=compiled)


def test_wrong_arguments_are_errors():
    values = draw("gauss")
    with pytest.raises(ValueError, match="bits must be 1 to 8, got 9"):
        cluster(values, 9)
    with pytest.raises(ValueError, match=r"got torch.int64 \[4, 400\]"):
        cluster(values.long(), 4)
    with pytest.raises(ValueError, match="must not be negative"):
        cluster(values, 4, values)
    with pytest.raises(ValueError, match="shape of the values"):
        cluster(values, 4, values[:1].abs())


def test_without_a_compiler_it_runs_on_torch_operations(tmp_path, monkeypatch):
    monkeypatch.setenv("MPTRAIN_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    native.load.cache_clear()
    try:
        found = cluster(draw("gauss"), 4)
    finally:
        native.load.cache_clear()
    expected = cluster(draw("gauss"), 4, compiled=False)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
