import pytest
import torch
from kit.tiny_models import FAMILIES, inputs, logits, tiny, train

from mptrain.compress.boundary import cut
from mptrain.compress.prune.magnitude import MagnitudePruner
from mptrain.compress.structure.find import find_structure
from mptrain.recipe import Magnitude


def pruner(model, keep=0.5, steps=0, **changes):
    keep = keep if isinstance(keep, dict) else {"encoder_params": keep}
    schedule = {"start": 0, "end": steps, "unit": "step"}
    plain = {"method": "magnitude", "keep": keep, "schedule": schedule, "min_ffn": 1, "round_ffn": 1}
    found = MagnitudePruner(
        Magnitude.model_validate(plain | changes),
        structure=find_structure(model),
        phase_steps=steps,
        steps_per_epoch=10,
    )
    found.prepare(model)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_is_the_energy_of_the_unit(family):
    model = tiny(family)
    found = pruner(model).importance()
    for block in find_structure(model):
        for u in range(0, block.units, 1 + block.units // 5):
            rows = [model.get_parameter(a.parameter).detach()[a.indices[u]] for a in block.sources]
            columns = model.get_parameter(block.sinks[0].parameter).detach()[:, block.sinks[0].indices[u]]
            energy = sum(float((part.double() ** 2).sum()) for part in (*rows, columns))
            assert found[block.name][u] == pytest.approx(energy)


@pytest.mark.parametrize("keep", [{"encoder_params": 0.5}, {"macs": 0.4}, {"heads": 0.5, "ffn": 0.25}])
def test_at_once(keep):
    model = tiny("bert")
    ours = pruner(model, keep)
    ours.collect(model, [])
    kept = ours.kept()
    for name, fraction in ours.budget.fraction(kept).items():
        assert keep[name] - 0.03 < fraction <= keep[name]
    importance = ours.importance()
    for block in ours.structure.of_kind("ffn"):
        scores, units = importance[block.name], kept.of(block)
        others = [scores[j] for j in range(48) if j not in units]
        assert scores[units].min() >= max(others, default=0.0)


def test_gradually_follows_the_weights_and_resumes_exactly():
    whole, half, resumed = tiny("bert"), tiny("bert"), tiny("bert", seed=3)
    ours, before, after = (pruner(m, keep=0.4, steps=6) for m in (whole, half, resumed))
    train(whole, ours, 6)
    opt = train(half, before, 4)
    resumed.load_state_dict(half.state_dict())
    again = torch.optim.AdamW(resumed.parameters(), lr=0.01)
    again.load_state_dict(opt.state_dict())
    after.load_state_dict(before.state_dict())
    assert 0.4 < 1 - after.sparsity() < 1
    train(resumed, after, 2, start=4, opt=again)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters()))
    assert ours.kept() == after.kept()
    assert 0.37 < ours.budget.fraction(ours.kept())["encoder_params"] <= 0.4
    masked = logits(whole, inputs("bert"))
    torch.testing.assert_close(logits(cut(whole, ours), inputs("bert")), masked, rtol=0, atol=1e-6)


def test_ignored_layers_stay_whole():
    model = tiny("bert")
    structure = find_structure(model, ignore=["encoder.layer.0"])
    plain = {"method": "magnitude", "keep": {"encoder_params": 0.7}}
    ours = MagnitudePruner(Magnitude.model_validate(plain), structure=structure, phase_steps=0, steps_per_epoch=1)
    ours.prepare(model)
    shrunk = cut(model, ours)
    left = {block.name: block.units for block in find_structure(shrunk)}
    assert (left["bert.encoder.layer.0.attention"], left["bert.encoder.layer.0.ffn"]) == (4, 48)
    assert ours.budget.fraction(ours.kept())["encoder_params"] <= 0.7
