"""The emulation of an fp16 asset against the asset itself, executed."""

from dataclasses import replace

import pytest
import torch
from kit import tiny_models

from mptrain.core.signature import probed
from mptrain.export.base import Source
from mptrain.export.coreai import emulated as coreai_half
from mptrain.export.coreai.convert import export_coreai
from mptrain.export.coreai.emulated import EmulatedAsset
from mptrain.export.coreai.format import CoreAiFormat
from mptrain.export.coreai.runner import Asset
from mptrain.export.facts import Facts
from mptrain.recipe import CoreAi


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model, batch = tiny_models.tiny("bert"), tiny_models.inputs("bert")
    folder = tmp_path_factory.mktemp("half")
    return model, batch, export_coreai(model, batch, folder / "m", precision="fp16", calibration=[batch], few=True)


def test_the_emulation_is_much_nearer_to_the_asset_than_fp32_is(exported):
    model, batch, done = exported
    emulated = EmulatedAsset(done.asset, model, batch, done.half["kept_fp32"])
    runner = Asset(done.asset)
    smallest = {name: value[:2, :8] for name, value in batch.items()}
    (executed,), (guessed,) = runner(smallest).values(), emulated(smallest).values()
    with torch.no_grad():
        exact = model(**smallest).logits.numpy()
    assert 0 < abs(executed - exact).max() < 1e-2
    assert abs(guessed - executed).max() < abs(exact - executed).max()
    assert done.half["executed"]["examples"] == 2


@pytest.mark.parametrize("native", [True, False])
def test_a_host_without_fp16_arithmetic_scores_by_emulation(exported, monkeypatch, native):
    model, batch, done = exported
    monkeypatch.setattr(coreai_half, "computes_half", lambda: native)
    source = Source(
        lambda: model, probed(model, batch), batch, "fp16", "fp32", False, lambda: [], Facts(half=done.half)
    )
    format_ = CoreAiFormat(CoreAi(id="coreai", format="coreai", of=["model"]))
    runner = format_.open(done.asset, source)
    assert isinstance(runner, Asset if native else EmulatedAsset)
    assert runner.facts().execution == type(runner).execution
    exact = format_.open(done.asset, replace(source, precision="fp32"))
    assert isinstance(exact, Asset)


@pytest.mark.parametrize(("flags", "native"), [(["avx2", "f16c"], False), (["avx512_fp16"], True), (["asimdhp"], True)])
def test_fp16_arithmetic_is_told_by_the_flags(monkeypatch, flags, native):
    monkeypatch.setattr(coreai_half, "host", lambda: {"cpu_flags": flags})
    assert coreai_half.computes_half() is native
