import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.tiny_models import tiny

from mptrain.compress.structure import budget as budget_module
from mptrain.compress.structure import costs
from mptrain.compress.structure.blocks import Axis, Block, Kept, Structure
from mptrain.compress.structure.budget import Budget
from mptrain.compress.structure.find import find_structure
from mptrain.compress.structure.shrink import shrink
from mptrain.core.errors import UserError
from mptrain.data.sources import cnn
from mptrain.recipe import Keep


def made_up(name, kind, units, cost, fixed, prunable):
    axis = Axis(f"{name}.o", 1, np.arange(units)[:, None], "sink", units, cost)
    return Block(name, kind, units, (axis,), name, heads=int(kind == "heads"), fixed_params=fixed, prunable=prunable)


def attention(index, units, cost=7, prunable=True):
    return made_up(f"attention.{index}", "heads", units, cost, 2, prunable)


def ffn(index, width, cost=3, prunable=True):
    return made_up(f"ffn.{index}", "ffn", width, cost, 1, prunable)


def of(*blocks):
    return Structure("bert", blocks)


def random_importance(structure, seed=0):
    rng = np.random.default_rng(seed)
    return {block.name: rng.exponential(size=block.units) for block in structure.prunable()}


def value(kept, importance):
    return sum(importance[name][units].sum() for name, units in kept.units.items())


def cost(structure, kept):
    return sum(costs.params(b, kept.count(b)) for b in structure)


def brute_force(structure, importance, limit, floors, step):
    """The best value over all widths of all blocks; with a width the best units are clear."""
    choices = []
    for block in structure.prunable():
        scores = np.sort(importance[block.name])[::-1]
        floor = min(floors[block.kind], block.units)
        allowed = [
            n
            for n in range(1, block.units + 1)
            if n >= floor and (block.kind == "heads" or n % step == 0 or n == block.units)
        ]
        choices.append([(costs.params(block, n), scores[:n].sum()) for n in allowed])
    fixed = sum(costs.params(b, b.units) for b in structure if not b.prunable)
    return max(
        (sum(v for _, v in pick) for pick in itertools.product(*choices) if fixed + sum(c for c, _ in pick) <= limit),
        default=None,
    )


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    heads=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    unit_costs=st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(1, 12)),
    keep=st.integers(50, 1000).map(lambda n: n / 1000),
    floors=st.tuples(st.integers(1, 3), st.integers(1, 5)),
    step=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_is_the_optimum(heads, widths, unit_costs, keep, floors, step, seed):
    blocks = [attention(i, n, unit_costs[0]) for i, n in enumerate(heads)]
    channels = [ffn(i, n, unit_costs[1 + i]) for i, n in enumerate(widths)]
    structure = of(*blocks, *channels)
    importance = random_importance(structure, seed)
    total = cost(structure, budget_module.Kept())
    best = brute_force(structure, importance, keep * total + 1e-9, {"heads": floors[0], "ffn": floors[1]}, step)
    arguments = {"min_heads": floors[0], "min_ffn": floors[1], "round_ffn": step}
    if best is None:
        with pytest.raises(UserError, match="cannot be reached"):
            Budget(structure, Keep(encoder_params=keep), **arguments)
        return
    search = Budget(structure, Keep(encoder_params=keep), **arguments)
    kept = search.search(importance)
    assert cost(structure, kept) <= keep * total + 1e-9
    assert value(kept, importance) == pytest.approx(best)
    assert search.fraction(kept)["encoder_params"] == pytest.approx(cost(structure, kept) / total)
    kept.check(structure)


@pytest.mark.parametrize("keep", [0.2, 0.33, 0.5, 0.77, 0.95])
def test_large_costs_are_near_the_optimum_and_use_the_budget(keep):
    """BERT-base sizes need more cells than there are: checked against the best of all numbers of heads."""
    blocks = [attention(i, 12, cost=196_800) for i in range(12)]
    channels = [ffn(i, 3072, cost=1537) for i in range(12)]
    structure = of(*blocks, *channels)
    importance = random_importance(structure)
    search = Budget(structure, Keep(encoder_params=keep), min_ffn=8, round_ffn=8)
    kept = search.search(importance)
    total = cost(structure, budget_module.Kept())
    addable = [196_800 if b.kind == "heads" else 8 * 1537 for b in structure if kept.cuts(b)]
    assert 0 <= keep * total - cost(structure, kept) < min(addable)  # nothing that was cut would still fit

    # two kinds of equal cost: with k heads given, the best chunks of 8 that fit are the optimum
    heads = np.sort(np.concatenate([np.sort(importance[f"attention.{i}"])[::-1][1:] for i in range(12)]))[::-1]
    first = sum(importance[f"attention.{i}"].max() for i in range(12))
    chunks = [np.sort(importance[f"ffn.{i}"])[::-1].reshape(-1, 8).sum(1) for i in range(12)]
    rest = np.sort(np.concatenate([c[1:] for c in chunks]))[::-1].cumsum()
    first += sum(c[0] for c in chunks)
    room = keep * total - 12 * (2 + 1 + 196_800 + 8 * 1537)
    best = 0.0
    for k in range(min(132, int(room // 196_800)) + 1):
        fit = min(len(rest), int((room - k * 196_800) // (8 * 1537)))
        best = max(best, first + heads[:k].sum() + (rest[fit - 1] if fit else 0.0))
    assert best * 0.9995 <= value(kept, importance) <= best * (1 + 1e-9)


def test_everything_or_nothing_is_special():
    structure = of(attention(0, 4), ffn(0, 13))
    importance = {"attention.0": np.zeros(4), "ffn.0": np.zeros(13)}
    search = Budget(structure, Keep(encoder_params=1.0), min_ffn=4, round_ffn=4)
    assert search.search(importance).units["ffn.0"] == list(range(13))  # also what is worth nothing, while it fits
    half = Budget(structure, Keep(encoder_params=0.5), min_ffn=4, round_ffn=4)
    assert half.search(importance, ease=0.0).units["attention.0"] == [0, 1, 2, 3]
    kept = half.search(importance)
    assert 0.4 < half.fraction(kept)["encoder_params"] <= 0.5


def test_ease_moves_the_budget():
    structure = of(*(attention(i, 8) for i in range(2)), *(ffn(i, 64) for i in range(2)))
    search = Budget(structure, Keep(encoder_params=0.4))
    importance = random_importance(structure)
    fractions = [search.fraction(search.search(importance, ease))["encoder_params"] for ease in (0, 0.25, 0.5, 1)]
    for ease, fraction in zip((0, 0.25, 0.5, 1), fractions):
        assert 1 - 0.6 * ease - 0.01 < fraction <= 1 - 0.6 * ease


def test_heads_and_ffn_are_two_budgets():
    structure = of(*(attention(i, 8) for i in range(2)), *(ffn(i, 64) for i in range(2)))
    search = Budget(structure, Keep(heads=0.25, ffn=0.75), round_ffn=8)
    kept = search.search(random_importance(structure))
    assert search.fraction(kept) == {"heads": 0.25, "ffn": 0.75}
    assert all(len(units) % 8 == 0 for name, units in kept.units.items() if name.startswith("ffn"))


def test_ignored_blocks_count_but_stay():
    structure = of(attention(0, 4), attention(1, 4, prunable=False), ffn(0, 10), ffn(1, 10))
    search = Budget(structure, Keep(encoder_params=0.6))
    kept = search.search(random_importance(structure))
    assert set(kept.units) == {"attention.0", "ffn.0", "ffn.1"}
    assert cost(structure, kept) <= 0.6 * cost(structure, budget_module.Kept())
    with pytest.raises(UserError, match=r"ignored layers at least 0\.386"):
        Budget(structure, Keep(encoder_params=0.3))


def test_macs_weigh_attention_by_length():
    structure = find_structure(tiny("bert"))
    importance = {block.name: np.ones(block.units) for block in structure}
    short = Budget(structure, Keep(macs=0.5), length=8)
    long = Budget(structure, Keep(macs=0.5), length=4096)
    channels = [sum(b.search(importance).count(f) for f in structure.of_kind("ffn")) for b in (short, long)]
    assert channels[0] < channels[1] == 96  # at length 4096 a channel costs next to nothing
    for b, length in ((short, 8), (long, 4096)):
        kept = b.search(importance)
        full = sum(row["macs"] for row in costs.layer_costs(structure, length))
        left = sum(row["macs"] for row in costs.layer_costs(structure, length, kept))
        assert left / full == pytest.approx(b.fraction(kept)["macs"]) and left / full <= 0.5


def test_latency_from_a_table():
    structure = find_structure(tiny("bert"))
    table = {"attention/32/8/1": {"1": 1.0, "4": 4.0}, "ffn/32/1": {"1": 0.5, "24": 0.4, "48": 6.0}}
    assert costs.latency(structure.of_kind("heads")[0], 2, table) == 2.0
    assert costs.latency(structure.of_kind("ffn")[0], 24, table) == 0.5  # never less than for fewer channels
    assert costs.latency(structure.of_kind("ffn")[0], 36, table) == pytest.approx(3.25)
    whole = costs.Whole.through(20.0, 3.0, 0.3, table=table)  # two layers of 4 + 6; 0.3 left is 3 of them, and the rest
    assert whole.constant == pytest.approx(1 - 20 * 0.7 / 17)
    search = Budget(structure, Keep(latency=0.5), whole=whole, round_ffn=8)
    kept = search.search(random_importance(structure))
    assert 0.4 < search.fraction(kept)["latency"] <= 0.5
    assert search.fraction(Kept())["latency"] == pytest.approx(1.0)
    with pytest.raises(UserError, match="needs what the whole model costs on its target"):
        Budget(structure, Keep(latency=0.5))


def test_a_budget_below_what_pruning_does_not_touch_is_refused():
    structure = of(attention(0, 4), ffn(0, 8))
    whole = costs.Whole(0.01, 1 - 0.01 * sum(costs.params(b, b.units) for b in structure))
    with pytest.raises(UserError, match=r"keep\.size: 0\.1 .*at least 0\.58 stays \(0\.45 of it embeddings"):
        Budget(structure, Keep(size=0.1), whole=whole, min_heads=1, min_ffn=1)


def test_a_budget_is_corrected_by_what_was_measured():
    """Blocks that cost a quarter more than predicted: what is chosen then costs what was asked for."""
    structure = of(*(attention(i, 16) for i in range(4)), *(ffn(i, 64) for i in range(4)))
    whole = costs.Whole(0.8 / sum(costs.params(b, b.units) for b in structure), 0.2)

    def real(kept):
        return 0.2 + 1.25 * (search.fraction(kept)["size"] - 0.2)

    search = Budget(structure, Keep(size=0.6), whole=whole)
    importance = random_importance(structure)
    first = search.search(importance)
    assert real(first) == pytest.approx(0.7, abs=0.01)
    search.correct(0.6, [(first, real(first))])
    assert real(search.search(importance)) == pytest.approx(0.6, abs=0.01)
    search.correct(0.6, [(first, 40.0)])  # nonsense of a busy host: by a factor of 2, to the floors at most
    assert search.limits[0].least <= search.limits[0].keep


def test_a_correction_between_two_measurements_is_linear():
    """Where time falls in a step, one factor overshoots: what lies on both sides of the budget says where it is."""
    structure = of(*(attention(i, 16) for i in range(4)), *(ffn(i, 64) for i in range(4)))
    whole = costs.Whole(0.8 / sum(costs.params(b, b.units) for b in structure), 0.2)
    search = Budget(structure, Keep(size=0.6), whole=whole)
    importance = random_importance(structure)
    first = search.search(importance)  # predicted 0.6
    search.correct(0.6, [(first, 0.5)])
    assert search.limits[0].keep == pytest.approx(0.2 + 0.4 / 0.75, abs=0.01)  # by the factor (0.5 - 0.2) / (0.6 - 0.2)
    second = search.search(importance)
    predicted = [search.fraction(kept)["size"] for kept in (first, second)]
    search.correct(0.6, [(first, 0.5), (second, 0.7)])
    assert search.limits[0].keep == pytest.approx(sum(predicted) / 2)
    search.correct(0.6, [(second, 0.5), (first, 0.7)])  # more left, and less time: noise, so from the nearest again
    assert search.limits[0].least <= search.limits[0].keep <= 1.0


def test_widths_are_rounded_to_what_the_target_is_fast_at():
    structure = find_structure(tiny("bert"))
    table = {"attention/32/8/1": {"1": 1.0, "4": 4.0}, "ffn/32/1": {"1": 1.0, "48": 6.0}}
    whole = costs.Whole(0.05, 0.0, table, {"ffn/32/1": 16})
    search = Budget(structure, Keep(latency=0.6), whole=whole, round_ffn=4)
    kept = search.search(random_importance(structure))
    assert all(kept.count(block) % 16 == 0 for block in structure.of_kind("ffn"))


def test_round_up():
    block = ffn(0, 21)
    search = Budget(of(attention(0, 4), block), Keep(encoder_params=1.0), min_ffn=6, round_ffn=8)
    assert [search.round_up(block, n) for n in (0, 1, 8, 9, 16, 17, 21)] == [8, 8, 8, 16, 16, 21, 21]


def test_bad_importance_is_refused():
    structure = of(attention(0, 4), ffn(0, 4))
    search = Budget(structure, Keep(encoder_params=0.5))
    for bad in (np.ones(3), np.array([1, -1, 1, 1.0]), np.array([1, np.nan, 1, 1])):
        with pytest.raises(ValueError, match="importance"):
            search.search({"attention.0": bad, "ffn.0": np.ones(4)})


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("budget", ["macs", "encoder_params"])
def test_of_convolutions_as_much_stays_as_is_asked_for(keep, budget):
    """Blocks that cut the inputs and the outputs of one convolution; against a count of the model that was cut."""
    example = {"pixel_values": torch.randn(1, 3, 16, 16)}

    def count(model):
        structure = find_structure(model, example)
        rows = costs.layer_costs(structure, costs.measure_extents(model, structure, example))
        return sum(row["macs" if budget == "macs" else "params"] for row in rows)

    torch.manual_seed(0)
    model = cnn.resnet(4, width=32).eval()
    structure = find_structure(model, example)
    extents = costs.measure_extents(model, structure, example)
    search = Budget(structure, Keep(**{budget: keep}), length=extents)
    kept = search.search(random_importance(structure))
    whole = count(model)
    left = count(shrink(model, structure, kept)) / whole
    assert search.fraction(kept)[budget] == pytest.approx(left, rel=5e-3)  # shares are whole numbers of parameters
    assert keep - 0.05 < left <= keep * 1.005


def test_floors_of_convolutions_are_what_really_stays():
    structure = find_structure(cnn.resnet(4, width=32).eval(), {"pixel_values": torch.randn(1, 3, 16, 16)})
    Budget(structure, Keep(encoder_params=0.1), min_ffn=8)  # a quarter of the channels is a sixteenth of the weights
    with pytest.raises(UserError, match=r"0\.01 cannot be reached"):
        Budget(structure, Keep(encoder_params=0.01), min_ffn=8)
