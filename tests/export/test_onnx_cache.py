"""ONNX files with a key-value cache: token by token as torch, and as every option of weights stores them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers as t
from kit.decoders import BATCH, FAMILIES, LONGEST, OTHERS, check_continues, made
from kit.long import except_for
from kit.tiny_models import inputs, tiny

import mptrain
from mptrain.cli import main
from mptrain.compress.quantize import quantizers
from mptrain.compress.weights import weight_only
from mptrain.core.errors import UserError
from mptrain.export.onnx import convert
from mptrain.export.onnx.facts import facts
from mptrain.export.onnx.runner import CachedSession, Session, opened
from mptrain.recipe import Qat, WeightOnly


def as_torch(model, folder):
    done = convert.write(model, BATCH, folder, cache=LONGEST)
    runner = CachedSession(done.path, LONGEST)
    check_continues(runner, model)
    return runner.facts()


@pytest.mark.parametrize("family", except_for(["gpt2", "opt", "llama", "mistral"], ["opt", "llama"]))
def test_greedy_continuations_are_those_of_torch(family, tmp_path):
    found = as_torch(made(FAMILIES[family]()), tmp_path)
    assert found.fused_attention == found.attention_layers == 2


@pytest.mark.long
@pytest.mark.parametrize("family", sorted({*FAMILIES, *OTHERS} - {"gpt2", "opt", "llama", "mistral"}))
def test_greedy_continuations_of_others_are_those_of_torch(family, tmp_path):
    as_torch(made((FAMILIES | OTHERS)[family]()), tmp_path)


def rtn(model):
    weight_only.compress(model, WeightOnly(mode="weight_only", method="rtn", block_size=16), [])
    return model


def weights(path):
    """Constants of some size, as type, shape and bytes."""
    held = ir.load(path).graph.initializers.values()
    found = [v.const_value for v in held if v.const_value is not None and v.const_value.nbytes >= 64]
    return sorted((str(x.dtype), tuple(x.shape), x.tobytes()) for x in found if x.dtype != ir.DataType.INT64)


@pytest.mark.parametrize(
    ("family", "precision", "change"),
    [
        pytest.param("llama", "fp32", rtn, marks=pytest.mark.long),
        pytest.param(
            "opt", "fp32", lambda model: quantizers.quantize(model, Qat(mode="qat"), [BATCH]), marks=pytest.mark.long
        ),
        pytest.param("gpt2", "fp16", lambda model: model, marks=pytest.mark.long),
    ],
)
def test_weights_are_those_of_the_export_without_a_cache(family, precision, change, tmp_path):
    model = change(tiny(family))
    paths = []
    for name, cache in (("plain", None), ("cached", 20)):
        (tmp_path / name).mkdir()
        done = convert.write(model, BATCH, tmp_path / name, precision=precision, cache=cache, calibration=[BATCH])
        paths.append(done.path)
    assert weights(paths[0]) == weights(paths[1])
    batch = inputs(family)
    before, after = (opened(path)(batch)["logits"] for path in paths)
    apart = np.abs(after - before)[batch["attention_mask"].bool()].max()
    assert apart < (1e-4 if precision == "fp32" else 2e-3)


@pytest.mark.long
def test_the_cache_of_an_fp16_file_is_half_and_costs_no_cast(tmp_path):
    """Unless what makes it stays in float32: then all of it is float32, as the empty ones of a caller have one type."""
    done = convert.write(tiny("llama"), BATCH, tmp_path, precision="fp16", cache=20, calibration=[BATCH])
    runner = opened(done.path)
    past = {kind for name, kind in runner.inputs.items() if name.startswith("past_key_values")}
    assert past == {"tensor(float16)"} and runner.facts().cache_precision == "fp16"
    assert done.half["kept_fp32"] == {} and facts(done.path).float_casts == 1, "the logits"
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.mul_(1e6)
            layer.self_attn.q_proj.weight.mul_(1e-6)
    loud = tmp_path / "loud"
    loud.mkdir()
    runner = opened(convert.write(model, BATCH, loud, precision="fp16", cache=20, calibration=[BATCH]).path)
    past = {kind for name, kind in runner.inputs.items() if name.startswith("past_key_values")}
    assert past == {"tensor(float)"} and runner.facts().cache_precision == "fp32"


@pytest.mark.long
def test_names_are_optimums(tmp_path):
    session = Session(convert.write(tiny("llama"), BATCH, tmp_path, cache=20).path)
    kept = [f"past_key_values.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    assert list(session.inputs) == ["input_ids", "attention_mask", "position_ids", *kept]
    assert session.outputs == ["logits", *(name.replace("past_key_values", "present") for name in kept)]
    assert session.shapes[kept[0]] == ["batch", 2, "past", 8] and session.shapes["attention_mask"][1] == "places"


def test_what_cannot_have_a_cache_is_refused_by_name(tmp_path):
    mamba = made(t.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1))
    for model, message in (
        (mamba, "MambaForCausalLM keeps other things than keys and values; export it without"),
        (tiny("bert"), "needs a plain float32 causal LM, got BertForSequenceClassification"),
    ):
        with pytest.raises(UserError, match=message):
            convert.write(model, BATCH, tmp_path, cache=20)
    runner = opened(convert.write(tiny("opt"), BATCH, tmp_path, cache=9).path, 9)
    with pytest.raises(UserError, match="a text of 10 tokens does not fit the export's cache of 9: raise `cache`"):
        runner({"input_ids": torch.ones(1, 10, dtype=torch.long)})


@pytest.mark.long
def test_the_command_writes_it_and_verify_reads_it(tmp_path, capsys):
    mptrain.save(tiny("llama"), tmp_path / "model")
    words = ["export", str(tmp_path / "model"), "--to", str(tmp_path / "out"), "--format", "onnx", "--cache", "40"]
    assert main([*words, "--samples", "4"]) == 0, capsys.readouterr().err
    assert "A key-value cache of 40 tokens in fp32; judged by parity" in capsys.readouterr().out
    assert "ORTModelForCausalLM" in (tmp_path / "out" / "README.md").read_text()
    words = ["verify", str(tmp_path / "out"), "--model", str(tmp_path / "model"), "--samples", "4"]
    assert main(words) == 0, capsys.readouterr().err
    assert "is the source model" in " ".join(capsys.readouterr().out.split())
