"""Movement pruning against values derived by hand and against an autograd implementation written here."""

import math

import numpy as np
import pytest
import torch
from kit import tiny_models
from kit.structures import by_index, sink
from kit.tiny_models import inputs, logits, tiny
from torch.func import functional_call

from mptrain.compress.boundary import cut
from mptrain.compress.prune.movement import MovementPruner
from mptrain.compress.prune.scores import Group, quantile
from mptrain.compress.structure import costs
from mptrain.compress.structure.find import find_structure
from mptrain.core.errors import UserError
from mptrain.recipe import Movement


def recipe(**changes):
    plain = {
        "method": "movement",
        "regularization": 0.02,
        "schedule": {"start": 2, "end": 8, "unit": "step"},
        "attention_block": (8, 16),
        "min_ffn": 1,
        "round_ffn": 1,
    }
    return Movement.model_validate({k: v for k, v in (plain | changes).items() if v is not None})


def target(**changes):
    return recipe(regularization=None, **({"keep": {"encoder_params": 0.4}} | changes))


def pruner(config, model, **arguments):
    found = MovementPruner(
        config,
        structure=find_structure(model, ignore=arguments.pop("ignore", ())),
        **({"phase_steps": 20, "steps_per_epoch": 10, "lr": 0.01} | arguments),
    )
    found.prepare(model)
    return found


def optimizer(model, ours):
    groups = [{"params": list(model.parameters()), "lr": 0.01}, *ours.parameter_groups()]
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)


def train(model, ours, steps, start=0, opt=None):
    return tiny_models.train(model, ours, steps, start, opt or optimizer(model, ours))


def set_scores(ours, name, values):
    (group,) = [g for g in ours._groups if g.parameter == name]
    with torch.no_grad():
        group.of(ours.scores).copy_(torch.as_tensor(values).view(group.shape))


# -- by hand


def test_schedule_by_hand():
    ours = pruner(recipe(threshold=-0.5), tiny("bert"))
    # p = (step - 2) / 6, s = 1 - (1 - p)³, τ = -0.5 · (1 - s) = -0.5 · (1 - p)³
    expected = {
        0: (-math.inf, 0.0),
        1: (-math.inf, 0.0),
        2: (-0.5, 0.0),
        3: (-0.5 * (5 / 6) ** 3, 0.02 * (1 - (5 / 6) ** 3)),
        5: (-0.0625, 0.02 * 0.875),
        8: (0.0, 0.02),
        15: (0.0, 0.02),
    }
    for step, (threshold, factor) in expected.items():
        settings = ours.at(step)
        assert settings["threshold"] == pytest.approx(threshold, abs=1e-15)
        assert settings["regularization_factor"] == pytest.approx(factor, abs=1e-15)


def test_schedule_in_epochs_ends_with_the_phase():
    config = recipe(threshold=-0.5, schedule={"start": 0.5, "end": 3})
    ours = pruner(config, tiny("bert"), phase_steps=25)
    assert (ours.warmup.start, ours.warmup.end) == (5, 25)
    assert ours.at(15)["progress"] == 0.5


def test_quantile_counts_every_element():
    torch.manual_seed(1)
    for n, repeat in ((1, 1), (1, 7), (5, 1), (6, 9), (50, 4)):
        scores = torch.randn(n)
        expected = torch.quantile(scores.repeat_interleave(repeat).double(), 0.98)
        assert float(quantile(scores, repeat, 0.98)) == pytest.approx(float(expected), abs=1e-6)


def test_first_threshold_is_the_kth_smallest_element():
    model = tiny("bert")
    ours = pruner(recipe(), model)
    with torch.no_grad():
        ours.scores.copy_(torch.randn(len(ours.scores)))
    elements = torch.cat([g.of(ours.scores.detach()).flatten().repeat_interleave(g.factor) for g in ours._groups])
    assert len(elements) == sum(row["params"] for row in costs.layer_costs(ours.structure, 1))
    k = min(len(elements), int(0.001 * len(elements)) + 1)
    assert ours._first_threshold() == float(elements.kthvalue(k).values)


def test_masks_by_hand():
    model = tiny("bert")
    ours = pruner(recipe(threshold=-0.5, schedule={"start": 0, "end": 8, "unit": "step"}), model)
    layer = "bert.encoder.layer.0"
    with torch.no_grad():
        ours.scores.fill_(1.0)
    # query 32×32 in blocks of 8×16: scores [4, 2]; the step is strict
    set_scores(ours, f"{layer}.attention.self.query.weight", [[-0.6, 1], [-0.5, -0.4], [1, 2], [1, 1]])
    set_scores(ours, f"{layer}.attention.self.query.bias", [-0.6, 1, 2, 3])
    set_scores(ours, f"{layer}.output.dense.weight", [-1.0] * 10 + [0.5] * 38)
    # all scores below τ: one row of 48 is more than 2% of the elements, so the best is the quantile itself
    set_scores(ours, f"{layer}.intermediate.dense.weight", np.linspace(-9, -2, 48))
    # one score for the whole bias is its own quantile, and the step is strict
    set_scores(ours, f"{layer}.output.dense.bias", [-0.7])
    ours.masked.gradients_ready()
    ours.masked.take_update()
    ours.next_masks(0)
    ours.masked.apply(ours._masks)

    mask = ours._masks[f"{layer}.attention.self.query.weight"]
    assert mask.shape == (32, 32)
    expected = torch.ones(32, 32, dtype=torch.bool)
    expected[0:8, 0:16] = expected[8:16, 0:16] = False  # -0.6 and -0.5 itself; -0.4 stays
    assert torch.equal(mask, expected)
    assert ours._masks[f"{layer}.attention.self.query.bias"].tolist() == [False] * 8 + [True] * 24
    assert ours._masks[f"{layer}.output.dense.weight"].squeeze().tolist() == [False] * 10 + [True] * 38
    alive = ours._masks[f"{layer}.intermediate.dense.weight"].squeeze()
    assert not alive.any()
    assert ours._masks[f"{layer}.output.dense.bias"].tolist() == [False]
    # 2 blocks, 8 of a bias, 10 columns, 48 rows, 32 of a bias
    cut = 2 * 8 * 16 + 8 + 10 * 32 + 48 * 32 + 32
    assert ours.sparsity() == pytest.approx(cut / sum(r["params"] for r in costs.layer_costs(ours.structure, 1)))
    query = model.bert.encoder.layer[0].attention.self.query
    assert torch.equal(query.weight, ours.masked.dense[f"{layer}.attention.self.query.weight"] * expected)


def test_the_best_two_percent_stay():
    model = tiny("bert")
    ours = pruner(recipe(attention_block=(4, 4)), model)
    name = "bert.encoder.layer.1.attention.self.key.weight"
    set_scores(ours, name, torch.linspace(-9, -2, 64))  # all below τ
    (group,) = [g for g in ours._groups if g.parameter == name]
    # position 0.98 · 1023 = 1002.54 lies within the 16 elements of score 62
    assert group.of(ours._alive_by_threshold(0.0)).flatten().nonzero().tolist() == [[63]]
    assert group.of(ours._alive_by_threshold(-3.0)).sum() == 9  # -2, -2.11 … -2.89
    assert group.of(ours._alive_by_threshold(-math.inf)).all()


def test_regularizer_by_hand():
    model = tiny("bert")
    ours = pruner(recipe(threshold=-0.5), model, ignore=["encoder.layer.1"])
    with torch.no_grad():
        ours.scores.fill_(0.0)
    set_scores(ours, "bert.encoder.layer.0.output.dense.bias", [math.log(3.0)])  # σ = 3/4
    set_scores(ours, "bert.encoder.layer.0.attention.self.key.weight", [[math.log(4.0)] * 2] + [[0.0] * 2] * 3)
    ours._step = 5
    ours.gradients(True)
    # 6 layers; attention: f = 8·16 = 128, f₀ = 8; fc_in: f = 32, f₀ = 1; fc_out: f = 32, f₀ = 32; σ(0) = ½
    key = 0.5 * (128 * (2 * 0.8 + 6 * 0.5) / 8 + 8 * 0.5)
    other = 0.5 * (128 * 0.5 + 8 * 0.5)
    fc_in = 0.5 * (32 * 0.5 + 1 * 0.5)
    fc_out = 0.5 * (32 * 0.5 + 32 * 0.75)
    factor = 0.02 * 0.875
    value = factor * (key + 3 * other + fc_in + fc_out) / 6
    assert ours.logs()["compress/regularization"] == pytest.approx(value, rel=1e-6)

    (bias,) = [g for g in ours._groups if g.parameter.endswith("layer.0.output.dense.bias")]
    (weight,) = [g for g in ours._groups if g.parameter.endswith("self.key.weight")]
    # no backward pass: the regularizer is the whole gradient
    assert float(bias.of(ours.scores.grad)) == pytest.approx(factor * 0.5 * 32 * 0.75 * 0.25 / 6, rel=1e-6)
    first = weight.of(ours.scores.grad)
    assert float(first[0, 1]) == pytest.approx(factor * 0.5 * 128 / 8 * 0.8 * 0.2 / 6, rel=1e-6)
    assert float(first[2, 0]) == pytest.approx(factor * 0.5 * 128 / 8 * 0.25 / 6, rel=1e-6)


def test_resolution_by_hand_and_rewind():
    """A unit stays if any part of any of its matrices or biases is alive; then all of it is dense again."""
    model = tiny("bert")
    ours = pruner(recipe(threshold=-0.5, schedule={"start": 0, "end": 8, "unit": "step"}), model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    layer = "bert.encoder.layer.0"
    with torch.no_grad():
        ours.scores.fill_(-1.0)
    low = -torch.ones(8)
    set_scores(ours, f"{layer}.attention.self.query.weight", torch.tensor([1.0, *low[1:]]))  # head 0, by 1 block of q
    set_scores(ours, f"{layer}.attention.self.value.bias", [-1, -1, 1.0, -1])  # head 2, by its bias
    # o: columns; block [2, 1] is rows 16–24, columns 16–32: heads 2 and 3
    set_scores(ours, f"{layer}.attention.output.dense.weight", torch.tensor([-1, -1, -1, -1, -1, 1.0, -1, -1]))
    set_scores(ours, f"{layer}.attention.output.dense.bias", torch.ones(4))  # of no unit
    set_scores(ours, f"{layer}.intermediate.dense.weight", [1.0] + [-1] * 47)
    set_scores(ours, f"{layer}.intermediate.dense.bias", [-1, 1.0] + [-1] * 46)
    set_scores(ours, f"{layer}.output.dense.weight", [-1, -1, 1.0] + [-1] * 45)
    set_scores(ours, f"{layer}.output.dense.bias", [1.0])
    ours.masked.gradients_ready()
    ours.masked.take_update()
    ours.next_masks(0)
    ours.masked.apply(ours._masks)
    # scores that are all the same have no element above their own quantile: layer 1 is all dead, floors keep it
    kept = by_index(ours.structure, ours.kept())
    assert kept.heads == {0: [0, 2, 3], 1: [0]}
    assert kept.ffn == {0: [0, 1, 2], 1: [0]}
    ours.restore_dense()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


def test_floors_take_the_best_of_the_dead_and_round_up():
    model = tiny("bert")
    config = recipe(
        threshold=-0.5, schedule={"start": 0, "end": 8, "unit": "step"}, min_heads=2, min_ffn=4, round_ffn=8
    )
    ours = pruner(config, model)
    with torch.no_grad():
        ours.scores.fill_(-1.0)
    scores = torch.full((48,), -1.0)
    scores[[5, 7]] = 1.0
    scores[40:46] = -0.9
    set_scores(ours, "bert.encoder.layer.0.output.dense.weight", scores)
    set_scores(ours, "bert.encoder.layer.0.attention.self.value.bias", [-1, -1, 1.0, -1])
    set_scores(ours, "bert.encoder.layer.0.attention.self.query.weight", [[-1, -1], [-1, -1], [-1, -1], [-0.9, -0.9]])
    ours._set_masks(ours._alive_by_threshold(-0.5))
    kept = by_index(ours.structure, ours.kept())
    # channels 5 and 7 are alive (2 of them above the 0.98 quantile); 8 is the next number, filled by score
    assert kept.ffn[0] == [5, 7, 40, 41, 42, 43, 44, 45]
    assert kept.heads[0] == [2, 3]
    assert kept.heads[1] == [0, 1] and kept.ffn[1] == list(range(8))


# -- against autograd


class _Step(torch.autograd.Function):
    """Step function with a straight-through gradient."""

    @staticmethod
    def forward(ctx, importance, threshold):
        return (importance > threshold).to(importance.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Reference:
    """Movement sparsity as a graph: masks in the forward pass, scores and regularizer by autograd."""

    def __init__(self, model, block, tau0, start, end, regularization):
        self.model, self.tau0, self.start, self.end, self.regularization = model, tau0, start, end, regularization
        self.scores, self.factors, self.linears = {}, {}, []
        for i in range(2):
            for path in (
                "attention.self.query",
                "attention.self.key",
                "attention.self.value",
                "attention.output.dense",
            ):
                self.add(f"bert.encoder.layer.{i}.{path}", block)
            self.add(f"bert.encoder.layer.{i}.intermediate.dense", "rows")
            self.add(f"bert.encoder.layer.{i}.output.dense", "columns")

    def add(self, name, kind):
        o, i = self.model.get_parameter(f"{name}.weight").shape
        r, c = {"rows": (1, i), "columns": (o, 1)}.get(kind, kind)
        self.linears.append(name)
        for part, factors, shape in ((".weight", (r, c), (o // r, i // c)), (".bias", (r,), (o // r,))):
            self.factors[name + part] = factors
            self.scores[name + part] = torch.zeros(shape, requires_grad=True)

    def schedule(self, step):
        p = (step - self.start) / (self.end - self.start)
        s = 1 - (1 - p) ** 3
        return (-math.inf, 0.0) if step < self.start else (self.tau0 * (1 - s), s * self.regularization)

    def loss(self, batch, step):
        tau, factor = self.schedule(step)
        masked, regularizer = {}, 0.0
        for name, scores in self.scores.items():
            full = scores
            for dim, n in enumerate(self.factors[name]):
                full = full.repeat_interleave(n, dim)
            threshold = min(tau, float(torch.quantile(full.detach(), 0.98)))
            masked[name] = self.model.get_parameter(name) * _Step.apply(full, threshold)
        for name in self.linears:
            for part in (".weight", ".bias"):
                mean = torch.sigmoid(self.scores[name + part]).mean()
                regularizer = regularizer + 0.5 * math.prod(self.factors[name + part]) * mean
        loss = functional_call(self.model, masked, kwargs=batch).loss
        return loss + factor * regularizer / len(self.linears), masked


def test_matches_an_autograd_implementation_over_a_warm_up():
    model, twin = tiny("bert"), tiny("bert")
    ours = pruner(recipe(threshold=-0.004, score_lr=0.002), model)
    reference = Reference(twin, (8, 16), -0.004, 2, 8, 0.02)
    first = optimizer(model, ours)
    second = torch.optim.AdamW(
        [{"params": list(twin.parameters())}, {"params": list(reference.scores.values()), "lr": 0.002}],
        lr=0.01,
        weight_decay=0.0,
    )
    sparsities, survivors = [], None
    for step in range(8):
        batch = inputs("bert", labels=True, seed=step)
        for opt in (first, second):
            opt.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        ours.gradients(True)
        expected, _ = reference.loss(batch, step)
        expected.backward()
        value = loss.item() + ours.logs()["compress/regularization"]
        assert value == pytest.approx(expected.item(), rel=1e-5)
        for group in ours._groups:
            torch.testing.assert_close(
                group.of(ours.scores.grad), reference.scores[group.parameter].grad, rtol=1e-4, atol=1e-7
            )
        for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
        first.step()
        second.step()
        # Adam divides tiny gradients by themselves, which blows rounding up: go on from the same point
        with torch.no_grad():
            for group in ours._groups:
                group.of(ours.scores).copy_(reference.scores[group.parameter])
            for p, q in zip(model.parameters(), twin.parameters()):
                p.copy_(q)
        ours.updated(step + 1)
        sparsities.append(ours.sparsity())
        if step + 1 < 8:
            _, masked = reference.loss(batch, step + 1)
            assert all(torch.equal(model.get_parameter(name), value) for name, value in masked.items())
        else:  # the masks of the last warm-up step are what is resolved
            assert ours.kept() == survivors
        survivors = ours._survivors() if step < 7 else survivors
    assert sparsities[0] == 0 and 0.05 < sparsities[6] < 1


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_shared_score_gradient_is_that_of_a_gate(family):
    """dL/dS of a unit is the derivative to a factor on its outputs, also while it is masked."""
    model = tiny(family)
    ours = pruner(target(score="shared"), model)
    with torch.no_grad():
        ours.scores.copy_(torch.randn(len(ours.scores)))
    ours._step = 5
    ours._set_kept(ours.budget.search(ours.importance()))
    assert ours._masks
    ours.masked.apply(ours._masks)
    batch = inputs(family, labels=True)
    model(**batch).loss.backward()
    ours.gradients(True)

    gates, handles = {}, []
    for block in ours.structure.prunable():
        units = ours._kept.of(block)
        gate = torch.zeros(block.units).index_fill_(0, torch.tensor(units), 1.0).requires_grad_()
        gates[block.name] = gate

        def hook(module, args, gate=gate, columns=block.sinks[0].per_unit):
            return (args[0] * gate.repeat_interleave(columns),)

        handles.append(model.get_submodule(sink(block)).register_forward_pre_hook(hook))
    loss = model(**batch).loss  # gradients_ready put the dense weights back
    gradients = torch.autograd.grad(loss, list(gates.values()))
    for handle in handles:
        handle.remove()
    for group, expected in zip(ours._groups, gradients):
        torch.testing.assert_close(group.of(ours.scores.grad), expected, rtol=1e-4, atol=1e-7)
    dead = [g for g, gate in zip(gradients, gates.values()) if (gate == 0).any() and (g[gate == 0] != 0).any()]
    assert dead  # a masked unit still learns whether to come back


# -- whole warm-ups

CONFIGS = {
    "nncf": recipe(),
    "nncf shared": recipe(score="shared"),
    "block": target(),
    "shared": target(score="shared", score_lr=0.02),
    "pair": target(keep={"heads": 0.5, "ffn": 0.25}),
    "macs": target(keep={"macs": 0.5}, score="shared"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_warm_up_and_finalize(name):
    model = tiny("bert")
    ours = pruner(CONFIGS[name], model, lr=0.02)
    train(model, ours, 8)
    logs = ours.logs()
    assert 0 < logs["compress/sparsity"] < 1
    kept = ours.kept()
    if ours.config.keep is not None:
        for limit, fraction in ours.budget.fraction(kept).items():
            assert getattr(ours.config.keep, limit) - 0.1 < fraction <= getattr(ours.config.keep, limit)
    dense = {n: d.clone() for n, d in ours.masked.dense.items()}
    shrunk = cut(model, ours)
    assert [b.units for b in find_structure(shrunk)] == [kept.count(b) for b in ours.structure]
    output, channels = "bert.encoder.layer.0.output.dense.weight", kept.units["bert.encoder.layer.0.ffn"]
    assert torch.equal(shrunk.get_parameter(output), dense[output][:, channels])  # rewound


def test_a_warm_up_that_ends_with_the_phase_is_resolved():
    model = tiny("bert")
    ours = pruner(target(schedule={"start": 0, "end": 6, "unit": "step"}), model, phase_steps=6)
    train(model, ours, 6)
    cut(model, ours)
    assert model.config.mptrain_structure["blocks"]["bert.encoder.layer.0.ffn"]["units"] < 48


def test_the_target_is_reached_gradually():
    model = tiny("bert")
    ours = pruner(target(schedule={"start": 0, "end": 8, "unit": "step"}), model)
    opt, seen = None, []
    for step in range(8):
        opt = train(model, ours, 1, start=step, opt=opt)
        seen.append(1 - ours.sparsity())
    for step, left in enumerate(seen[:-1], start=1):
        wanted = 1 - 0.6 * (1 - (1 - step / 8) ** 3)
        assert wanted - 0.05 < left <= wanted
    assert 0.38 < ours.budget.fraction(ours.kept())["encoder_params"] <= 0.4


@pytest.mark.parametrize("name", CONFIGS)
def test_after_the_warm_up_the_structure_stays_and_trains(name):
    model = tiny("bert")
    ours = pruner(CONFIGS[name], model, lr=0.02)
    opt = train(model, ours, 8)
    kept, scores = ours.kept(), ours.scores.detach().clone()
    left = sum(costs.params(block, kept.count(block)) for block in ours.structure)
    total = sum(row["params"] for row in costs.layer_costs(ours.structure, 1))
    assert ours.sparsity() == pytest.approx(1 - left / total)
    before = model.bert.encoder.layer[0].output.dense.weight.detach().clone()
    train(model, ours, 3, start=8, opt=opt)
    assert ours.kept() == kept and torch.equal(ours.scores, scores)
    assert not torch.equal(model.bert.encoder.layer[0].output.dense.weight, before)
    masked = logits(model, inputs("bert"))
    torch.testing.assert_close(logits(cut(model, ours), inputs("bert")), masked, rtol=0, atol=1e-6)


def test_shared_target_masks_are_the_final_structure():
    model = tiny("bert")
    ours = pruner(target(score="shared"), model)
    train(model, ours, 8)
    batch = inputs("bert")
    masked = logits(model, batch)
    kept = ours.kept()
    assert ours.budget.fraction(kept)["encoder_params"] <= 0.4
    cut(model, ours)
    torch.testing.assert_close(logits(model, batch), masked, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_resume_is_exact(name):
    config = CONFIGS[name]
    whole = tiny("bert")
    ours = pruner(config, whole, lr=0.02)
    train(whole, ours, 8)

    halved = tiny("bert")
    before = pruner(config, halved, lr=0.02)
    opt = train(halved, before, 5)
    saved = (before.state_dict(), opt.state_dict(), {n: p.clone() for n, p in halved.state_dict().items()})
    assert all(isinstance(t, torch.Tensor) and t.device.type == "cpu" for t in saved[0].values())

    resumed = tiny("bert", seed=9)
    after = pruner(config, resumed, lr=0.02)
    resumed.load_state_dict(saved[2])
    opt = optimizer(resumed, after)
    opt.load_state_dict(saved[1])
    after.load_state_dict(saved[0])
    assert all(torch.equal(p, saved[2][n]) for n, p in resumed.state_dict().items())
    train(resumed, after, 3, start=5, opt=opt)
    for (name_, p), (_, q) in zip(whole.named_parameters(), resumed.named_parameters()):
        assert torch.equal(p, q), name_
    assert torch.equal(ours.scores, after.scores)
    assert ours.kept() == after.kept()
    assert ours.logs() == after.logs()


def test_eager_and_sdpa_keep_the_same_heads():
    kept = []
    for attn in ("eager", "sdpa"):
        model = tiny("bert", attn)
        ours = pruner(target(score="shared", score_lr=0.02), model)
        train(model, ours, 8)
        kept.append(by_index(ours.structure, ours.kept()).heads)
    assert kept[0] == kept[1]


def test_frozen_weights_are_pruned_but_do_not_train():
    model = tiny("bert")
    name = "bert.encoder.layer.0.output.dense.weight"
    model.get_parameter(name).requires_grad_(False)
    ours = pruner(recipe(), model)
    before = model.get_parameter(name).detach().clone()
    train(model, ours, 8)
    (group,) = [g for g in ours._groups if g.parameter == name]
    ours.restore_dense()
    assert torch.equal(model.get_parameter(name), before)
    assert group.of(ours.scores).unique().numel() == 1  # only the regularizer moved them


# -- errors


def test_nothing_left_to_prune():
    with pytest.raises(UserError, match="leaves no attention"):
        pruner(target(), tiny("bert"), ignore=["encoder"])


def test_block_that_does_not_divide():
    with pytest.raises(UserError, match=r"12×16 does not divide bert\.encoder\.layer\.0.*query.*e\.g\. \[4, 16\]"):
        pruner(recipe(attention_block=(12, 16)), tiny("bert"))


def test_regularization_needs_a_late_start_or_a_threshold():
    with pytest.raises(UserError, match=r"schedule\.start must be at least one step"):
        pruner(recipe(schedule={"start": 0, "end": 4, "unit": "step"}), tiny("bert"))


def test_a_threshold_that_masks_everything_is_warned_of(caplog):
    pruner(recipe(threshold=0.1), tiny("bert"))
    assert "use a negative number" in caplog.text


def test_a_warm_up_without_steps():
    with pytest.raises(UserError, match="has no step"):
        pruner(target(schedule={"start": 1, "end": 2}), tiny("bert"), phase_steps=5)


def test_group_pools_and_spreads():
    group = Group("heads", "w", 0, 0, (2, 3), (2, 4))
    values = torch.arange(48.0).view(4, 12)
    pooled = group.pool(values)
    assert pooled[1, 2] == values[2:4, 8:12].sum()
    assert torch.equal(group.spread(pooled)[2:4, 8:12], pooled[1, 2].expand(2, 4))
