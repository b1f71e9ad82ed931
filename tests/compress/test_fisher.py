"""Fisher pruning against autograd on explicit mask variables and against brute force."""

import itertools

import pytest
import torch
from kit.structures import by_index, keep, sink
from kit.tiny_models import FAMILIES, inputs, logits, tiny, train

from mptrain.compress.boundary import cut
from mptrain.compress.prune.fisher import DECAY, FisherPruner, rearrange
from mptrain.compress.prune.rescale import refit
from mptrain.compress.structure.find import find_structure
from mptrain.compress.structure.shrink import shrink
from mptrain.recipe import Fisher


def pruner(model, keep=0.5, steps=0, **changes):
    schedule = {"start": min(2, steps), "end": steps, "unit": "step"}
    plain = {"method": "fisher", "keep": {"encoder_params": keep}, "schedule": schedule, "min_ffn": 1, "round_ffn": 1}
    found = FisherPruner(
        Fisher.model_validate(plain | changes),
        structure=find_structure(model),
        phase_steps=steps,
        steps_per_epoch=10,
    )
    found.prepare(model)
    return found


def batches(family, count=3):
    return [inputs(family, labels=True, seed=i) for i in range(count)]


def gate_gradients(model, structure, batch, alive=None):
    """Autograd to a mask variable on the input of every output projection."""
    gates, handles = {}, []
    for block in structure:
        gate = torch.ones(block.units) if alive is None else alive[block.name].clone()
        gates[block.name] = gate.requires_grad_()

        def hook(module, args, gate=gate, columns=block.sinks[0].per_unit):
            return (args[0] * gate.repeat_interleave(columns),)

        handles.append(model.get_submodule(sink(block)).register_forward_pre_hook(hook))
    found = torch.autograd.grad(model(**batch).loss, list(gates.values()))
    for handle in handles:
        handle.remove()
    return dict(zip(gates, found))


@pytest.mark.parametrize("family", FAMILIES)
def test_collect_is_the_squared_mask_gradient(family):
    model = tiny(family)
    ours = pruner(model)
    expected = {}
    for batch in batches(family):
        for key, g in gate_gradients(model, ours.structure, batch).items():
            expected[key] = expected.get(key, 0) + g.double() ** 2
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.train()  # dropout must not act
    ours.collect(model, batches(family))
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    importance = ours.importance()
    for name, value in expected.items():
        torch.testing.assert_close(torch.from_numpy(importance[name]), value, rtol=1e-3, atol=1e-12)


def test_collect_with_frozen_weights_and_another_loss():
    model = tiny("bert")
    for p in model.parameters():
        p.requires_grad_(False)
    ours = pruner(model)
    ours.collect(model, batches("bert"), loss_fn=lambda m, b: m(**b).logits.square().sum())
    assert not any(p.requires_grad for p in model.parameters())
    assert ours.importance()["bert.encoder.layer.0.ffn"].sum() > 0


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_at_once(keep):
    model = tiny("bert")
    ours = pruner(model, keep)
    with pytest.raises(RuntimeError, match="collect"):
        ours.kept()
    ours.collect(model, batches("bert"))
    kept = ours.kept()
    assert keep - 0.02 < ours.budget.fraction(kept)["encoder_params"] <= keep
    assert ours.kept() == kept
    shrunk = cut(model, ours)
    assert [b.units for b in find_structure(shrunk)] == [kept.count(b) for b in ours.structure]


def test_keeps_what_matters():
    """Units whose outputs are silenced have no Fisher information and go first."""
    model = tiny("bert")
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.attention.output.dense.weight[:, 8:16] = 0  # head 1
        layer.output.dense.weight[:, 10:20] = 0
    ours = pruner(model, keep=0.5)
    ours.collect(model, batches("bert"))
    kept = by_index(ours.structure, ours.kept())
    assert 1 not in kept.heads[0]
    assert not set(kept.ffn[0]) & set(range(10, 20))


# -- rearrangement


def fisher_loss(rows, kept):
    cut = [j for j in range(rows.shape[1]) if j not in kept]
    return float(rows.double()[:, cut].sum(1).square().sum())


@pytest.mark.parametrize("seed", range(20))
def test_rearranging_never_raises_the_loss(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(6, 9, generator=generator)
    for count in (1, 4, 8):
        order = rows.square().sum(0).argsort(descending=True)[:count].tolist()
        found = rearrange(rows, sorted(order))
        assert len(found) == count and found == sorted(set(found))
        assert fisher_loss(rows, found) <= fisher_loss(rows, order) + 1e-9


def test_rearranging_sees_what_the_diagonal_cannot():
    # units 0 and 1 are large but cancel: cutting both costs nothing, cutting either one 9 (and 2 is worth 1)
    rows = torch.tensor([[3.0, -3.0, 1.0]])
    assert fisher_loss(rows, [0]) == 4
    assert rearrange(rows, [0]) == [2]
    best = min(itertools.combinations(range(3), 1), key=lambda kept: fisher_loss(rows, kept))
    assert list(best) == [2]


def test_rearranging_leaves_full_layers_alone():
    assert rearrange(torch.randn(3, 4), [0, 1, 2, 3]) == [0, 1, 2, 3]


# -- gradually


def test_running_sum_is_of_mask_gradients_also_for_masked_units():
    model = tiny("bert")
    ours = pruner(model, steps=8)
    ours._set_kept(keep(ours.structure, {0: [0, 2]}, {1: list(range(0, 48, 2))}))
    ours.masked.apply(ours._masks)
    alive = {block.name: torch.ones(block.units) for block in ours.structure}
    heads = "bert.encoder.layer.0.attention"
    alive[heads][[1, 3]] = 0
    alive["bert.encoder.layer.1.ffn"][1::2] = 0
    twin = tiny("bert")
    expected = {key: torch.zeros_like(gate) for key, gate in alive.items()}
    for step in range(2):
        batch = inputs("bert", labels=True, seed=step)
        model.zero_grad()
        model(**batch).loss.backward()
        ours.gradients(True)
        for key, g in gate_gradients(twin, ours.structure, batch, alive).items():
            expected[key] = DECAY * expected[key] + g**2
        ours.masked.take_update()
        ours.masked.apply(ours._masks)
    importance = ours.importance()
    for name, value in expected.items():
        torch.testing.assert_close(torch.from_numpy(importance[name]).float(), value, rtol=1e-3, atol=1e-12)
    assert (importance[heads][[1, 3]] > 0).all()


def test_a_masked_unit_comes_back():
    model = tiny("bert")
    ours = pruner(model, steps=8, keep=0.9)
    train(model, ours, 5)
    ours._set_kept(keep(ours.structure, {0: [0, 1, 2]}))
    for total in ours._sums.values():
        total.fill_(1e-6)
    ours._sums["bert.encoder.layer.0.attention"][3] = 1.0  # its gradient says that it would help
    ours.masked.apply(ours._masks)
    train(model, ours, 3, start=5)
    assert 3 in by_index(ours.structure, ours.kept()).heads[0]


def test_warm_up_reaches_the_budget():
    model = tiny("bert")
    ours = pruner(model, steps=8, keep=0.4)
    opt, left = None, []
    for step in range(8):
        opt = train(model, ours, 1, start=step, opt=opt)
        left.append(1 - ours.sparsity())
    assert left[:2] == [1.0, 1.0] and left == sorted(left, reverse=True)
    masked = logits(model, inputs("bert"))
    assert 0.37 < ours.budget.fraction(ours.kept())["encoder_params"] <= 0.4
    torch.testing.assert_close(logits(cut(model, ours), inputs("bert")), masked, rtol=0, atol=1e-6)


def test_resume_is_exact():
    whole = tiny("bert")
    ours = pruner(whole, steps=8)
    train(whole, ours, 8)
    half = tiny("bert")
    before = pruner(half, steps=8)
    opt = train(half, before, 5)
    resumed = tiny("bert", seed=5)
    after = pruner(resumed, steps=8)
    resumed.load_state_dict(half.state_dict())
    again = torch.optim.AdamW(resumed.parameters(), lr=0.01)
    again.load_state_dict(opt.state_dict())
    after.load_state_dict(before.state_dict())
    train(resumed, after, 3, start=5, opt=again)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters()))
    assert ours.kept() == after.kept()


# -- rescale


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_refit_is_least_squares(family, monkeypatch):
    monkeypatch.setattr("mptrain.compress.prune.rescale.RIDGE", 1e-9)
    model = tiny(family)
    structure = find_structure(model)
    units = [1, 5, 7, 30]
    kept = keep(structure, {0: [0]}, {1: units})
    seen = []
    linear = model.get_submodule(sink(structure.of_kind("ffn")[1]))
    handle = linear.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach().reshape(-1, 48).double()))
    with torch.no_grad():
        for batch in batches(family):
            model(**batch)
    handle.remove()
    x = torch.cat(seen)
    target = x @ linear.weight.detach().double().T
    bias = linear.bias is not None
    design = torch.cat([x[:, units], torch.ones(len(x), 1)], 1) if bias else x[:, units]
    solution = torch.linalg.lstsq(design, target + (linear.bias.detach() if bias else 0)).solution

    refit(model, structure, kept, batches(family))
    found = linear.weight.detach()[:, units].double()
    torch.testing.assert_close(found, solution[: len(units)].T, rtol=1e-4, atol=1e-5)
    if bias:
        torch.testing.assert_close(linear.bias.detach().double(), solution[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_refit_brings_outputs_closer(family):
    data = batches(family, 6)
    dense = [logits(tiny(family), b) for b in data]
    errors = []
    for rescaled in (False, True):
        model = tiny(family)
        structure = find_structure(model)
        kept = keep(structure, {0: [0]}, {0: list(range(0, 32, 2)), 1: list(range(0, 32, 2))})
        if rescaled:
            refit(model, structure, kept, data)
        shrink(model, structure, kept)
        errors.append(sum(float((logits(model, b) - d).square().sum()) for b, d in zip(data, dense)))
    assert errors[1] < 0.9 * errors[0]


def test_refit_leaves_whole_blocks_and_mode_alone():
    model = tiny("bert").train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    structure = find_structure(model)
    refit(model, structure, keep(structure, {0: [0, 1, 2, 3]}, {1: [0, 1]}), batches("bert"))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"bert.encoder.layer.1.output.dense.weight", "bert.encoder.layer.1.output.dense.bias"}
    assert model.training and not model.bert.encoder.layer[1].output.dense._forward_pre_hooks
