"""Models without whole blocks in every format: what they compute, and that nothing of the blocks is left in a file."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
import torch
from kit.coreml import RANGED, texts
from kit.decoders import BATCH, FAMILIES, LONGEST, check_continues, made
from kit.dropped import without
from kit.long import except_for
from kit.tiny_models import inputs, tiny

from mptrain.compress.quantize import quantizers
from mptrain.export.coreai.cached import export_decoder as to_coreai_decoder
from mptrain.export.coreai.convert import export_coreai
from mptrain.export.coreai.runner import Asset
from mptrain.export.coreml.cached import export_decoder as to_coreml_decoder
from mptrain.export.coreml.convert import export_coreml
from mptrain.export.onnx import convert as onnx
from mptrain.export.onnx.runner import CachedSession, Session
from mptrain.export.openvino import write as openvino
from mptrain.export.openvino.runner import CachedIr, CompiledIr
from mptrain.mil.interpreter import Interpreter
from mptrain.recipe import Ptq, Qat
from mptrain.verify.parity import compare


def difference(model, runner, batch):
    return compare(model, runner, [batch])["max_abs_diff"]


def of_openvino(model, folder, batch):
    return CompiledIr(openvino.export_openvino(model, batch, folder / "out", precision="fp32").xml)


def of_onnx(model, folder, batch):
    folder.joinpath("out").mkdir()
    return Session(onnx.write(model, batch, folder / "out").path)


def of_coreai(model, folder, batch):
    return Asset(export_coreai(model, batch, folder / "out").asset)


@pytest.mark.parametrize("made_of", [of_openvino, of_onnx, of_coreai])
@pytest.mark.parametrize("family", except_for(["bert", "vit", "llama"], ["bert"]))
def test_a_file_is_the_model_at_another_size_and_has_no_attention_where_none_is(family, made_of, tmp_path):
    model = without(tiny(family))
    with closing(made_of(model, tmp_path, inputs(family, batch=2))) as runner:
        assert difference(model, runner, inputs(family, batch=3, seed=1)) < 1e-5
        facts = runner.facts()
    assert (facts.fused_attention, facts.attention_layers) == (1, 1)


@pytest.mark.parametrize(("family", "route"), except_for([("bert", "export"), ("opt", "trace")], [("bert", "export")]))
def test_a_core_ml_package_is_the_model_at_every_length(family, route, tmp_path):
    model = without(tiny(family))
    done = export_coreml(model, texts(2, 9), tmp_path / "out", shapes=RANGED, route=route)
    runner = Interpreter(done.package)
    for batch, length in ((1, 1), (3, 5), (4, 32)):
        assert difference(model, runner, texts(batch, length)) < 1e-5
    softmaxes = [op for op in runner.program.operations() if op.type in ("softmax", "scaled_dot_product_attention")]
    assert len(softmaxes) == (1 if route == "export" else 2)  # a trace asks the dead one for its sizes


@pytest.mark.parametrize("family", except_for(["gpt2", "opt", "llama", "gemma"], ["gpt2", "llama"]))
def test_a_cache_keeps_the_place_of_the_attention_that_is_gone(family, tmp_path):
    """The first layer's, whose cache tells how long the text is so far."""
    model = without(made(FAMILIES[family]()))
    folder = tmp_path / "onnx"
    folder.mkdir()
    check_continues(CachedSession(onnx.write(model, BATCH, folder, cache=LONGEST).path, LONGEST), model)
    done = openvino.write(model, BATCH, tmp_path / "openvino", precision="fp32", cache=LONGEST)
    with closing(CachedIr(done.xml, LONGEST)) as runner:
        check_continues(runner, model)


def step_by_step(runner, text):
    calls = ({"input_ids": text[:, i : i + 1], "position": torch.tensor([i])} for i in range(text.shape[1]))
    return np.concatenate([np.asarray(runner(call)["logits"]) for call in calls], 1)


@pytest.mark.parametrize("to", except_for(["coreml", "coreai"], ["coreml"]))
def test_a_cache_in_states(to, tmp_path):
    model = without(tiny("llama"))
    if to == "coreml":
        runner = Interpreter(to_coreml_decoder(model, tmp_path / "out", max_length=12).package, "fp32")
    else:
        runner = Asset(to_coreai_decoder(model, tmp_path / "out", max_length=12).asset)
    text = torch.randint(4, 50, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(input_ids=text).logits.numpy()
    for _ in range(2):
        runner.reset()
        assert np.abs(step_by_step(runner, text) - whole).max() < 1e-5


@pytest.mark.parametrize("config", [Qat(mode="qat", reduce_range=True), Ptq(mode="ptq", reduce_range=True)])
@pytest.mark.parametrize("family", except_for(["bert", "llama"], ["bert"]))
def test_what_is_left_is_quantized_and_exported_as_int8(family, config, tmp_path):
    model = without(tiny(family))
    quantized = quantizers.quantize(model, config, [inputs(family, seed=i) for i in range(2)])
    batch = inputs(family, batch=2)
    with torch.no_grad():
        expected, dense = quantized(**batch).logits.numpy(), model(**batch).logits.numpy()
    assert 0 < np.abs(expected - dense).max() < 0.1 * np.abs(dense).max()
    done = openvino.export_openvino(quantized, batch, tmp_path / "ov", precision="int8")
    with closing(CompiledIr(done.xml)) as runner:
        assert np.abs(runner(batch)["logits"] - expected).mean() < 0.01 * np.abs(expected).max()
    (tmp_path / "onnx").mkdir()
    with closing(Session(onnx.write(quantized, batch, tmp_path / "onnx", precision="int8").path)) as session:
        assert np.abs(session(batch)["logits"] - expected).mean() < 0.01 * np.abs(expected).max()
