"""A format as the target of a budget."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from kit.tiny_models import inputs, tiny

from mptrain.compress.runtime import Torch
from mptrain.compress.structure import latency
from mptrain.compress.structure.find import find_structure
from mptrain.core.hooks import is_quantized
from mptrain.export.target import opened
from mptrain.recipe import Ptq, Qat
from mptrain.recipe.target import stand_in

PTQ = Ptq(mode="ptq", ignore=["encoder.layer.0"], embeddings="fp32")


def test_a_model_is_exported_in_float():
    model = tiny("bert")
    compiled = opened(stand_in(None, 1)).compiled(model, inputs("bert", batch=1))
    assert compiled.seconds() > 0
    folder = compiled._folder.name
    assert compiled.bytes == pytest.approx(4 * sum(p.numel() for p in model.parameters()), rel=2)
    compiled.close()
    assert not Path(folder).exists()


@pytest.mark.parametrize("config", [PTQ, Qat(mode="qat")], ids=["ptq", "qat"])
def test_a_model_gets_the_quantizers_that_it_will_have(config):
    model, target = tiny("bert"), opened(stand_in(config, 1))
    assert target.words == "OpenVINO int8, 1 thread"
    quantized = target._quantized(model, inputs("bert", batch=1))
    assert is_quantized(quantized) and not is_quantized(model)
    assert target._quantized(quantized, inputs("bert", batch=1)) is quantized
    compiled = target.compiled(model, inputs("bert", batch=1))
    assert compiled.seconds() > 0
    compiled.close()


def test_blocks_alone_are_quantized_too():
    """Patterns of the settings name modules that a stack of blocks does not have."""
    block = find_structure(tiny("bert")).of_kind("ffn")[0]
    target = opened(stand_in(PTQ, 1))
    stack = latency._Stack(block, 16)
    assert is_quantized(target._quantized(stack, {"x": torch.randn(1, 8, 32)}))
    compiled = target.compiled(stack, {"x": torch.randn(1, 8, 32)})
    assert compiled.seconds() > 0
    compiled.close()


def test_blocks_alone_compute_what_torch_computes():
    block = find_structure(tiny("llama")).of_kind("heads")[0]
    stack, x = latency._Stack(block, 2), torch.randn(1, 8, 32)
    compiled = opened(stand_in(None, 1)).compiled(stack, {"x": x})
    with torch.no_grad():
        assert compiled._runner({"x": x})["y"] == pytest.approx(stack(x)["y"].numpy(), abs=1e-5)
    compiled.close()


def test_without_the_runtime_torch_stands_in(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert isinstance(opened(stand_in(None, 2)), Torch)
    assert "models are timed in torch; pip install 'mptrain[openvino]'" in caplog.text
