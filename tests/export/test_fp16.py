"""OpenVINO IR in fp16: stored and marked as the search says, and executed in fp16 where this CPU can."""

from __future__ import annotations

import json

import numpy as np
import openvino as ov
import pytest
import torch
from kit import tiny, tiny_models
from kit.jobs import run
from kit.text_encoder import TextEncoder, build
from transformers import BertConfig, PreTrainedModel
from transformers.utils import ModelOutput

from mptrain.cli import main
from mptrain.compress.quantize import quantizers
from mptrain.core.errors import ExportError, UserError
from mptrain.core.signature import probed, without_cache
from mptrain.export.openvino import half as openvino_fp16
from mptrain.export.openvino.convert import convert
from mptrain.export.openvino.runner import CompiledIr
from mptrain.export.openvino.write import export_openvino
from mptrain.export.torch.traceable import traceable_masks
from mptrain.recipe import Ptq
from mptrain.report.words import kept_in_fp32
from mptrain.verify.overflow import Op
from mptrain.verify.programs.aten import TorchOps


class Encoder(PreTrainedModel):
    """A text encoder with two outputs and the mask of UForm's, as a transformers model."""

    config_class = BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.encoder = TextEncoder()
        self.post_init()

    def forward(self, input_ids, attention_mask):
        return ModelOutput(**self.encoder(input_ids, attention_mask))


def constants(xml):
    """{friendly name: (element type, array)} of the floating constants."""
    nodes = ov.Core().read_model(xml).get_ops()
    kinds = ("f16", "f32")
    found = [n for n in nodes if n.get_type_name() == "Constant" and n.get_element_type().get_type_name() in kinds]
    return {n.get_friendly_name(): (n.get_element_type().get_type_name(), np.array(n.data)) for n in found}


def test_the_uform_mask_stays_in_fp32(tmp_path):
    model, batch = build(Encoder, BertConfig(hidden_size=32)), tiny_models.inputs("bert")
    done = export_openvino(model, batch, tmp_path / "fp16", precision="fp16")
    facts = done.half
    assert list(facts["kept_fp32"]) == ["encoder/mul"] and facts["casts"] == 2 and not facts["all_half"]["finite"]
    assert facts["nodes"] == ["__module.encoder/aten::mul/Multiply"]
    assert facts["kept"]["cosine"] > 0.9999 and json.dumps(facts, allow_nan=False)
    marked = [n for n in ov.Core().read_model(done.xml).get_ops() if "DisablePrecisionConversion_0" in n.get_rt_info()]
    multiply = next(n for n in marked if n.get_type_name() == "Multiply")
    assert multiply.get_friendly_name() == facts["nodes"][0]
    stored = constants(done.xml)
    large = [kind for kind, x in stored.values() if np.abs(x).max() > 65504]
    assert large == ["f32"] and len(facts["constants"]) == 1
    assert all(x.size == 1 for kind, x in stored.values() if kind == "f32"), "all weights are in fp16"
    with torch.no_grad():
        expected = model(**batch)
    for name, value in CompiledIr(done.xml)(batch).items():
        np.testing.assert_allclose(value, expected[name].numpy(), atol=5e-3)

    runner = CompiledIr(done.xml, precision="f16")
    if runner.precision == "f16":  # this CPU computes in fp16
        assert facts["executed"]["max_diff"] < 0.05
        nodes = runner.compiled.get_runtime_model().get_ops()
        kinds = {n.get_friendly_name(): n.get_rt_info()["runtimePrecision"].astype(str) for n in nodes}
        assert "f16" in kinds.values() and kinds.get(facts["nodes"][0], "f32") == "f32"
    else:
        assert facts["executed"] is None


def test_weights_that_fp16_would_distort_stay_fp32(tmp_path):
    model, batch = tiny_models.tiny("bert"), tiny_models.inputs("bert")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[7, 3] = 1e5
        model.bert.encoder.layer[1].output.dense.weight.mul_(1e-7)
    done = export_openvino(model, batch, tmp_path / "fp16", precision="fp16")
    kept = {name: x for name, (kind, x) in constants(done.xml).items() if kind == "f32"}
    assert set(done.half["constants"]) <= {name.removesuffix("_compressed") for name in kept} | set(kept)
    table = next(x for x in kept.values() if x.shape == (50, 32))
    np.testing.assert_array_equal(table, model.bert.embeddings.word_embeddings.weight.detach().numpy())
    assert any(0 < np.abs(x).max() < 1e-6 for x in kept.values()), "the tiny layer"
    with torch.no_grad():
        expected = model(**batch).logits.numpy()
    np.testing.assert_allclose(CompiledIr(done.xml)(batch)["logits"], expected, atol=5e-3)
    naive = tmp_path / "naive.xml"
    ov.save_model(convert(model, batch, probed(model, batch)), naive, compress_to_fp16=True)
    clipped = next(x for _, x in constants(naive).values() if x.shape == (50, 32))
    assert clipped.max() == 65504, "what OpenVINO does by itself"


def test_an_ordinary_model_is_half_the_size(tmp_path):
    model, batch = tiny_models.tiny("bert", hidden_size=64, intermediate_size=256), tiny_models.inputs("bert")
    exact = export_openvino(model, batch, tmp_path / "fp32", precision="fp32")
    done = export_openvino(model, batch, tmp_path / "fp16", precision="fp16")
    sizes = [e.xml.with_suffix(".bin").stat().st_size for e in (exact, done)]
    assert 0.45 < sizes[1] / sizes[0] < 0.56
    assert done.half["kept_fp32"] == {} and done.half["nodes"] == [] and done.half["casts"] == 0
    assert done.half["constants"] == []
    with torch.no_grad():
        expected = model(**batch).logits.numpy()
    np.testing.assert_allclose(CompiledIr(done.xml)(batch)["logits"], expected, atol=5e-3)


def test_an_op_that_is_not_in_the_graph_is_an_error():
    model, batch = tiny_models.tiny("bert"), tiny_models.inputs("bert")
    op = Op("bert.encoder/fft", "fft", "bert.encoder", ())
    with pytest.raises(ExportError, match="the IR has no node of that name"):
        openvino_fp16.marked(convert(model, batch, probed(model, batch)), {op.name}, [op])


@pytest.mark.parametrize("family", ["bert", "opt", "llama", "vit"])
def test_every_op_of_a_model_is_found_in_its_graph(family):
    model, batch = tiny_models.tiny(family, use_cache=False), tiny_models.inputs(family)
    graph = convert(model, batch, probed(model, batch))
    with traceable_masks(), without_cache(model):
        ops = TorchOps(model, [batch]).ops
    found = {}
    for op in ops:
        if "rotary" not in op.module:  # sines and cosines of positions are folded
            found[op.name] = openvino_fp16._nodes(graph, op, ops)
            assert all(f"__module.{op.module}/" in name for name in found[op.name])
    single = [name for name, nodes in found.items() if name.endswith(("query/addmm", "gelu", "act_fn/silu"))]
    assert all(len({n.rpartition("/")[0] for n in found[name]}) == 1 for name in single)


def test_a_batch_norm_that_conversion_folds_away_is_no_error(tmp_path):
    from transformers import AutoModelForImageClassification, ResNetConfig

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    model = AutoModelForImageClassification.from_config(config).eval()
    first = model.resnet.embedder.embedder
    first.convolution.weight.data *= 450
    first.normalization.running_var.fill_(2e5)
    batch = {"pixel_values": torch.randn(2, 3, 32, 32)}
    done = export_openvino(model, batch, tmp_path / "fp16", precision="fp16")
    assert list(done.half["kept_fp32"]) == ["resnet.embedder.embedder.normalization/native_batch_norm"]
    assert done.half["nodes"] == [], "it is in the weights of the convolution"
    with torch.no_grad():
        expected = model(**batch).logits.numpy()
    np.testing.assert_allclose(CompiledIr(done.xml)(batch)["logits"], expected, atol=2e-3)


def test_exports_say_that_they_take_no_cache(tmp_path):
    """optimum-intel refuses a causal LM without a cache whose config says that it uses one."""
    model, batch = tiny_models.tiny("llama"), tiny_models.inputs("llama")
    assert model.config.use_cache
    export_openvino(model, batch, tmp_path / "ov", precision="fp32")
    assert json.loads((tmp_path / "ov" / "config.json").read_text())["use_cache"] is False
    assert model.config.use_cache, "the model is as it was"


def test_a_model_with_quantizers_is_refused(tmp_path):
    batch = tiny_models.inputs("bert")
    model = quantizers.quantize(tiny_models.tiny("bert"), Ptq(mode="ptq"), [batch])
    with pytest.raises(UserError, match="precision fp16 of a model with quantizers"):
        export_openvino(model, batch, tmp_path / "fp16", precision="fp16")


def test_a_run_reports_what_stays_in_fp32(tmp_path):
    recipe = tiny.jpqd(tmp_path)
    recipe["stages"] = [{**recipe["stages"][0], "train": {"epochs": 1, "lr": 3e-3, "batch_size": 8}}]
    recipe["export"] = [{"id": "ov", "format": "openvino", "of": ["dense"], "precision": ["fp32", "fp16"]}]
    run(tiny.write(recipe, tmp_path / "tiny.yaml"))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    half = next(v for v in report["variants"] if v["id"] == "baseline_fp16")
    assert half["runtime"]["half"]["kept_fp32"] == {} and half["runtime"]["half"]["kept"]["cosine"] > 0.999
    assert half["size_bytes"] < report["variants"][0]["size_bytes"]
    page = (tmp_path / "run" / "report.md").read_text()
    assert "Kept in fp32" in page and "none" in page


def test_the_export_command_says_what_stays_in_fp32(tmp_path, capsys):
    tiny.save_bert(tmp_path / "bert")
    (tmp_path / "texts.txt").write_text("good film\nbad plot was not so good\n" * 4)
    words = [tmp_path / "bert", "--precision", "fp16", "--data", tmp_path / "texts.txt", "--to", tmp_path / "ov"]
    main(["export", *map(str, words)])
    assert "fp16: no op has to stay in fp32." in capsys.readouterr().out
    half = {"kept_fp32": {"encoder/mul": "largest |x| 3.4e+38"}, "casts": 2}
    assert kept_in_fp32(half) == "1 op in fp32: encoder/mul; 2 float↔half casts"
