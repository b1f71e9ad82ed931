"""Compression shared out over two and three gloo processes: the bits of one process."""

import itertools
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from kit import processes
from kit.tiny_models import inputs, tiny

from mptrain.compress.calibrate import layerwise
from mptrain.compress.calibrate.fisher_information import fisher
from mptrain.compress.calibrate.ranks import ALONE, Ranks, assign, share
from mptrain.compress.weights import records, weight_only
from mptrain.compress.weights.palettize import palettize
from mptrain.core.errors import ModelError
from mptrain.recipe import Palettize, WeightOnly

BATCHES = 5  # no multiple of the ranks


def test_the_load_is_balanced():
    costs = {f"w{i}": float(c) for i, c in enumerate([9, 1, 7, 3, 3, 2, 8, 5])}
    owners = assign(costs, 3)
    loads = [sum(costs[n] for n, rank in owners.items() if rank == r) for r in range(3)]
    best = min(
        max(sum(c for c, r in zip(costs.values(), ranks) if r == k) for k in range(3))
        for ranks in itertools.product(range(3), repeat=len(costs))
    )
    assert list(owners) == list(costs) and max(loads) <= 4 / 3 * best
    assert set(assign(costs, 1).values()) == {0}


def integers(ranks, method, family="bert", count=BATCHES, **changes):
    model = tiny(family)
    batches = [inputs(family, seed=i) for i in range(count)]
    labelled = [inputs(family, labels=True, seed=i) for i in range(count)]
    config = WeightOnly(mode="weight_only", method=method, block_size=16, **changes)
    weight_only.compress(model, config, batches if method != "rtn" else [], labelled, ranks)
    return model


def tables(ranks, method, **changes):
    model = tiny("bert")
    labelled = [inputs("bert", labels=True, seed=i) for i in range(BATCHES)]
    config = Palettize.model_validate({"method": method, "bits": 3, "group_size": 8} | changes)
    records.attach(model, palettize(model, config, labelled, ranks=ranks))
    return model


CASES = {
    "rtn": lambda ranks: integers(ranks, "rtn"),
    "scale": lambda ranks: integers(ranks, "scale"),
    "gptq": lambda ranks: integers(ranks, "gptq"),
    "gptq, tied": lambda ranks: integers(ranks, "gptq", "opt"),
    "fewer batches than ranks": lambda ranks: integers(ranks, "gptq", count=1, size_budget=6.5),
    "budget": lambda ranks: integers(ranks, "gptq", embeddings="fp32", size_budget=6.5),
    "kmeans": lambda ranks: tables(ranks, "kmeans"),
    "skm": lambda ranks: tables(ranks, "skm"),
    "vectors": lambda ranks: tables(ranks, "kmeans", cluster_dim=2),
    "skm, budget": lambda ranks: tables(ranks, "skm", size_budget=3.5),
}


def state(model):
    """Every tensor of the records and the model."""
    found = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    for name, record in records.of(model).items():
        found |= {f"{name}.{k}": v for k, v in vars(record).items() if isinstance(v, torch.Tensor)}
        found[f"{name}.bits"] = torch.tensor(record.bits)
    return found


def sums(ranks):
    model = tiny("bert")
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    found = {}
    for moments in layerwise.walk(model, linears, [inputs("bert", seed=i) for i in range(BATCHES)], ranks):
        found |= moments
    batches = [inputs("bert", labels=True, seed=i) for i in range(BATCHES)]
    return found | fisher(model, batches, [n for n, _ in model.named_parameters()], ranks=ranks)


def everything(ranks):
    return {name: state(case(ranks)) for name, case in CASES.items()} | {"sums": sums(ranks)}


def process(rank, count, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=60))
    computed = []
    work = lambda name: computed.append(name) or name  # noqa: E731
    found = everything(Ranks(rank, count))
    found["shared"] = dict(share(assign(dict.fromkeys("abcdef", 1.0), count), work, Ranks(rank, count)))
    found["computed"] = computed
    model = tiny("bert")
    model.classifier.weight.data[0, 0] = torch.nan
    try:
        weight_only.compress(
            model, WeightOnly(mode="weight_only", method="rtn", block_size=16), ranks=Ranks(rank, count)
        )
    except ModelError as error:
        found["error"] = str(error)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.long)])
def test_every_rank_ends_with_what_one_process_gives(tmp_path, count):
    alone = everything(ALONE)
    processes.ranks(process, (count, tmp_path), count)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(count)]
    for found in ranks:
        for case, expected in alone.items():
            assert found[case].keys() == expected.keys()
            assert all(torch.equal(found[case][name], tensor) for name, tensor in expected.items()), case
        assert "classifier.weight" in found["error"], "the error of the rank that met it"
        assert found["shared"] == {name: name for name in "abcdef"}
    assert sorted(itertools.chain(*(found["computed"] for found in ranks))) == list("abcdef"), "each once"


def test_threads_give_the_same_in_the_same_order():
    config = Palettize(method="kmeans", granularity="tensor", bits=3)
    one = palettize(tiny("bert"), config)
    torch.set_num_threads(3)
    many = palettize(tiny("bert"), config)
    assert list(one) == list(many)
    assert all(torch.equal(one[n].indices, many[n].indices) and torch.equal(one[n].lut, many[n].lut) for n in one)
    model = tiny("bert")
    model.classifier.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"classifier\.weight"):
        palettize(model, config)
