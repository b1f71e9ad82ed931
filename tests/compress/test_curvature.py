"""Curvature pruning of whole models: what it promises of its own loss, and what the cut model then computes."""

from __future__ import annotations

import logging

import pytest
import torch
from kit.architectures import build, without_loss
from kit.structures import sink
from kit.tiny_models import FAMILIES, inputs, logits, tiny

from mptrain.compress.boundary import cut
from mptrain.compress.calibrate.curvature import curvatures
from mptrain.compress.prune import rescale
from mptrain.compress.prune.curvature import CurvaturePruner, check_readers
from mptrain.compress.prune.fisher import FisherPruner
from mptrain.compress.prune.removal import damped, refit
from mptrain.compress.structure.blocks import Structure
from mptrain.compress.structure.find import find_structure
from mptrain.compress.structure.shrink import shrink
from mptrain.core.errors import ModelError, UserError
from mptrain.recipe import Curvature, Fisher


def pruner(model, keep=0.5, kind=CurvaturePruner, config=Curvature, **changes):
    name = "curvature" if kind is CurvaturePruner else "fisher"
    budget = {"heads": 1.0, "ffn": 0.5} if keep is None else {"encoder_params": keep}
    plain = {"method": name, "keep": budget, "min_ffn": 1, "round_ffn": 1}
    if kind is FisherPruner:
        plain["schedule"] = {"end": 0}
    found = kind(
        config.model_validate(plain | changes), structure=find_structure(model), phase_steps=0, steps_per_epoch=1
    )
    found.prepare(model)
    return found


def batches(family, count=8, batch=8):
    return [inputs(family, batch=batch, labels=True, seed=i) for i in range(count)]


def error(model, dense, found):
    """Mean squared error of the centred logits."""
    total = 0.0
    for batch in found:
        plain = {k: v for k, v in batch.items() if k != "labels"}
        a, b = logits(model, plain), logits(dense, plain)
        difference = (a - a.mean(-1, keepdim=True)) - (b - b.mean(-1, keepdim=True))
        total += float(difference.square().mean())
    return total / len(found)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_a_model_pruned_to_half_stays_closer_than_by_fisher_with_refit(family):
    data = batches(family)
    dense = tiny(family)
    ours = tiny(family)
    curvature = pruner(ours)
    curvature.look(ours, data)
    kept = curvature.kept()
    assert curvature.budget.fraction(kept)["encoder_params"] <= 0.5
    ours = cut(ours, curvature)

    theirs = tiny(family)
    fisher = pruner(theirs, kind=FisherPruner, config=Fisher)
    fisher.collect(theirs, data)
    rescale.refit(theirs, fisher.structure, fisher.kept(), data)
    theirs = shrink(theirs, fisher.structure, fisher.kept())
    assert error(ours, dense, data) < error(theirs, dense, data)


def test_units_of_the_same_sizes_lose_no_more_than_those_of_fisher():
    model, data = tiny("bert"), batches("bert")
    ours, fisher = pruner(model), pruner(model, kind=FisherPruner, config=Fisher)
    ours.look(model, data)
    fisher.collect(model, data)
    theirs = fisher.kept()
    names = [sink(block) for block in ours.structure]
    stats = {k: v for group in curvatures(model, names, data) for k, v in group.items()}
    total = {"ours": 0.0, "fisher": 0.0}
    for block in ours.structure:
        found, weight = stats[sink(block)], model.get_submodule(sink(block)).weight.detach().double()
        h = damped(found.covariance()[0], ours.config.damping)
        count = theirs.count(block)
        own = ours._removals[block.name].kept(count)
        for who, units in (("ours", own), ("fisher", theirs.of(block))):
            columns = torch.from_numpy(block.sinks[0].indices[units].flatten())
            change = -weight.clone()
            change[:, columns] += refit(weight, found.covariance()[0], columns, damping=ours.config.damping)
            total[who] += 0.5 * float(torch.trace(found.gram() @ change @ h @ change.T))
        assert ours._removals[block.name].loss[block.units - count] <= total["ours"] + 1e-9
    assert total["ours"] < total["fisher"]


def test_channels_that_are_copies_go_first_and_cost_nothing():
    """Half of the channels repeat the others: half of the FFN can leave and the model stays as it was."""
    model = tiny("bert")
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            for tensor in (layer.intermediate.dense.weight, layer.intermediate.dense.bias):
                tensor[24:] = tensor[:24]
    data = batches("bert")
    dense = [logits(model, {k: v for k, v in b.items() if k != "labels"}) for b in data]
    ours = pruner(model, keep=None, damping=1e-8)
    ours.look(model, data)
    model = cut(model, ours)
    assert model.bert.encoder.layer[0].intermediate.dense.out_features == 24
    for batch, before in zip(data, dense):
        after = logits(model, {k: v for k, v in batch.items() if k != "labels"})
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_the_same_input_gives_the_same_units_and_weights():
    results = []
    for _ in range(2):
        model = tiny("distilbert")
        ours = pruner(model)
        ours.look(model, batches("distilbert"))
        results.append((ours.kept().units, cut(model, ours).state_dict()))
    assert results[0][0] == results[1][0]
    for name, tensor in results[0][1].items():
        assert torch.equal(tensor, results[1][1][name])


def test_labels_are_not_needed_and_make_no_difference():
    with_labels, without = tiny("bert"), tiny("bert")
    a, b = pruner(with_labels), pruner(without)
    a.look(with_labels, batches("bert"))
    b.look(without, [{k: v for k, v in batch.items() if k != "labels"} for batch in batches("bert")])
    assert a.kept() == b.kept() and a.facts() == b.facts()


def test_few_tokens_are_said_and_a_budget_that_nothing_meets_is_refused(caplog):
    model = tiny("bert")
    ours = pruner(model)
    with caplog.at_level(logging.WARNING):
        ours.look(model, batches("bert", count=1, batch=2))
    assert "fewer than the inputs of 4 layers" in caplog.text and "data.calibration.samples" in caplog.text
    with pytest.raises(UserError, match=r"prune\.keep\.encoder_params: 0\.01 cannot be reached"):
        pruner(model, keep=0.01)
    with pytest.raises(ValueError, match="curvature prunes at once"):
        Curvature.model_validate({"method": "curvature", "keep": {"macs": 0.5}, "schedule": {"end": 1}})


def test_blocks_that_no_single_linear_reads_are_refused_by_name():
    model = tiny("bert")
    structure = find_structure(model)
    first = structure.blocks[0]
    doubled = Structure(structure.name, (type(first)(**{**vars(first), "axes": (*first.axes, first.sinks[0])}),))
    with pytest.raises(ModelError, match=rf"these are not: {first.name}.*prune\.ignore, or use method fisher"):
        check_readers(model, doubled, "prune.ignore")


@pytest.mark.parametrize("name", ["mpnet", "t5"])
def test_heads_that_all_layers_share_are_cut_in_all_of_them_at_once(name):
    """Their table of relative positions has one column to a head, so a head goes in every layer or in none."""
    model, batch = build(name)
    batch = without_loss(name, batch)
    structure = find_structure(model, batch)
    shared = max(structure.prunable(), key=lambda block: len(block.sinks))
    assert len(shared.sinks) >= 2
    config = Curvature.model_validate({"method": "curvature", "keep": {"heads": 0.5, "ffn": 0.5}, "min_ffn": 1})
    ours = CurvaturePruner(config, structure=structure, phase_steps=0, steps_per_epoch=1)
    ours.prepare(model)
    ours.look(model, [batch])
    cut_model = cut(model, ours)
    assert ours.kept().count(shared) == shared.units // 2
    assert torch.isfinite(cut_model(**batch).logits).all()
