import itertools

import numpy as np
import pytest
import torch
from kit.records import palettized, quantized
from kit.tiny_models import inputs, tiny

from mptrain.compress.calibrate.fisher_information import fisher
from mptrain.compress.weights import bits as sensitivity
from mptrain.compress.weights import records, weight_only
from mptrain.compress.weights.bits import Option, allocate
from mptrain.compress.weights.palettize import WIDTHS, palettize, tables
from mptrain.core.errors import UserError
from mptrain.recipe import Palettize, WeightOnly


def cases(seed, count=6, equal=False):
    rng = np.random.default_rng(seed)
    sizes = np.full(count, 100) if equal else rng.integers(20, 200, count)
    costs = np.sort(rng.exponential(1, (count, 3)), axis=1)[:, ::-1]
    return {f"w{i}": [Option(2**k, int(s * 2**k), float(costs[i, k])) for k in range(3)] for i, s in enumerate(sizes)}


@pytest.mark.parametrize("seed", range(20))
def test_against_every_allocation(seed):
    """It fits, and costs no more than the best that fits a budget smaller by the largest single step."""
    options = cases(seed)
    smallest, largest = (sum(o[i].size for o in options.values()) for i in (0, 2))
    budget = int(smallest + 0.4 * (largest - smallest))
    found = allocate(options, budget, "quantize.size_budget")
    assert sum(o.size for o in found.values()) <= budget

    def best(limit):
        every = itertools.product(*options.values())
        return min(sum(o.cost for o in pick) for pick in every if sum(o.size for o in pick) <= limit)

    cost = sum(o.cost for o in found.values())
    assert best(budget) <= cost + 1e-12
    assert cost <= best(budget - max(o[2].size - o[0].size for o in options.values())) + 1e-12


def test_the_ends():
    options = cases(0)
    assert all(
        o.bits == 1
        for o in allocate(options, sum(o[0].size for o in options.values()), "quantize.size_budget").values()
    )
    assert all(o.bits == 4 for o in allocate(options, 10**9, "quantize.size_budget").values())
    with pytest.raises(UserError, match="size_budget"):
        allocate(options, 10, "quantize.size_budget")


def test_cost_is_the_fisher_weighted_error_of_either_family():
    weight, importance = torch.randn(5, 12), torch.rand(5, 12)
    for record in (quantized(5, 12), palettized(5, 12)):
        found = sensitivity.option(weight, record, importance)
        expected = sum(
            float(importance[i, j] * (weight[i, j] - record.dense()[i, j]) ** 2) for i, j in np.ndindex(5, 12)
        )
        assert found.cost == pytest.approx(expected) and found.size == records.stored_bytes(record)


def test_a_model_within_its_budget():
    """More bits where the loss minds more: the estimate is no worse than that of the reverse choice."""
    labelled = [inputs("bert", labels=True, seed=i) for i in range(3)]
    batches = [{k: v for k, v in b.items() if k != "labels"} for b in labelled]
    config = WeightOnly(mode="weight_only", method="rtn", block_size=16, embeddings="fp32", size_budget=6.5)
    model, plain = tiny("bert"), tiny("bert")
    weight_only.compress(model, config, batches, labelled)
    found = records.distinct(records.of(model))
    weights = sum(r.q.numel() for r in found.values())
    assert {r.bits for r in found.values()} == {4, 8}
    assert 5.5 * weights < 8 * sum(map(records.stored_bytes, found.values())) <= 6.5 * weights
    information = fisher(plain, labelled, list(found))

    def cost(which):
        plan = {n: 8 if (r.bits == 8) == which else 4 for n, r in found.items()}
        model = tiny("bert")
        config = WeightOnly(
            mode="weight_only", method="rtn", block_size=16, embeddings="fp32",
            overrides={n.removesuffix(".weight"): {"bits": b} for n, b in plan.items()},
        )  # fmt: skip
        weight_only.compress(model, config)
        error = {n: (model.get_parameter(n) - plain.get_parameter(n)).detach().square() for n in found}
        return sum(float((information[n] * error[n]).sum()) for n in found)

    assert cost(True) < cost(False)


# -- tables


def squares(model, batch):
    return model(batch["input"]).square().mean()


def table_case():
    """Three layers of which the loss minds the first the most, and data."""
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 48))
    with torch.no_grad():
        model[0].weight.mul_(3)
    return model, [{"input": torch.randn(8, 32, generator=torch.Generator().manual_seed(i))} for i in range(4)]


@pytest.mark.parametrize("method", ["kmeans", "skm"])
@pytest.mark.parametrize("budget", [2.5, 4.0, 5.5])
def test_tables_within_a_budget_against_every_choice_of_bits(method, budget):
    model, data = table_case()
    config = Palettize(method=method, granularity="tensor", size_budget=budget)
    found = palettize(model, config, data, loss_fn=squares)
    information = fisher(model, data, found, squares)
    options = {name: [] for name in found}
    for bits in WIDTHS:
        every = palettize(model, Palettize(method=method, granularity="tensor", bits=bits), data, loss_fn=squares)
        for name, record in every.items():
            options[name].append(sensitivity.option(model.get_parameter(name).detach(), record, information[name]))
    limit = int(budget * sum(r.shape[0] * r.shape[1] for r in found.values()) / 8)
    size = sum(map(records.stored_bytes, found.values()))
    assert size <= limit
    assert len({r.bits for r in found.values()}) > 1
    cost = sum(o.cost for name in found for o in options[name] if o.bits == found[name].bits)

    def best(limit):
        every = itertools.product(*options.values())
        return min(sum(o.cost for o in pick) for pick in every if sum(o.size for o in pick) <= limit)

    # the greedy choice over hulls is the best for the bytes that it takes, and at most one step from the budget's
    assert cost == pytest.approx(best(size), rel=1e-9)
    step = max(b.size - a.size for of_weight in options.values() for a, b in itertools.pairwise(of_weight))
    assert best(limit) <= cost <= best(limit - step)


def test_bits_given_by_name_stay_and_no_width_is_used_that_is_not_offered():
    labelled = [inputs("opt", labels=True, seed=i) for i in range(2)]
    config = Palettize(
        method="skm", granularity="tensor", size_budget=4.0, embeddings=6, overrides={"layers.0.fc1": {"bits": 2}}
    )
    found = palettize(tiny("opt"), config, labelled, widths=[2, 4, 8])
    assert found["model.decoder.embed_tokens.weight"].bits == 6
    assert found["model.decoder.layers.0.fc1.weight"].bits == 2
    free = {n: r.bits for n, r in found.items() if "embed" not in n and "layers.0.fc1" not in n}
    assert set(free.values()) <= {2, 4, 8} and len(set(free.values())) > 1
    assert all(table.fixed == (name not in free) for name, table in tables(tiny("opt"), config).items())
    with pytest.raises(UserError, match=r"palettize\.size_budget needs calibration data"):
        palettize(tiny("opt"), Palettize(method="kmeans", size_budget=4.0))
    with pytest.raises(UserError, match=r"palettize\.size_budget: .* less than"):
        palettize(tiny("opt"), Palettize(method="kmeans", size_budget=0.5), labelled)
