import pytest
import torch
from kit.tiny_models import FAMILIES, inputs, logits, tiny, train

from mptrain.compress.boundary import cut
from mptrain.compress.prune.magnitude import MagnitudePruner
from mptrain.compress.structure.blocks import find_structure
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
    for a, f in zip(find_structure(model).attention, find_structure(model).ffn):
        q, k, v, o = (model.get_parameter(f"{name}.weight").detach().double() for name in a.linears)
        for u in range(a.units):
            rows = slice(u * a.columns, (u + 1) * a.columns)
            keys = slice(u * a.head_dim, (u + 1) * a.head_dim)
            parts = (q[rows], k[keys], v[keys], o[:, rows])
            assert found["heads"][a.index][u] == pytest.approx(float(sum((p**2).sum() for p in parts)))
        channel = f.width // 2
        rows = sum(model.get_parameter(f"{name}.weight").detach().double()[channel] ** 2 for name in f.fc_in).sum()
        column = (model.get_parameter(f"{f.fc_out}.weight").detach().double()[:, channel] ** 2).sum()
        assert found["ffn"][f.index][channel] == pytest.approx(float(rows + column))


@pytest.mark.parametrize("keep", [{"encoder_params": 0.5}, {"macs": 0.4}, {"heads": 0.5, "ffn": 0.25}])
def test_at_once(keep):
    model = tiny("bert")
    ours = pruner(model, keep)
    ours.collect(model, [])
    kept = ours.kept()
    for name, fraction in ours.budget.fraction(kept).items():
        assert keep[name] - 0.03 < fraction <= keep[name]
    importance = ours.importance()
    for i in range(2):
        others = [importance["ffn"][i][j] for j in range(48) if j not in kept.ffn[i]]
        assert importance["ffn"][i][kept.ffn[i]].min() >= max(others, default=0.0)


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
    assert shrunk.config.mptrain_structure["layers"]["0"] == {"heads": 4, "ffn": 48}
    assert ours.budget.fraction(ours.kept())["encoder_params"] <= 0.7
