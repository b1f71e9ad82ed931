"""`mptrain export`: one model, run again and compared, as a user calls it."""

from __future__ import annotations

import json

import pytest
import torch
from kit import pictures, tiny

import mptrain
from mptrain.cli import main
from mptrain.commands import export as single
from mptrain.compress.quantize.quantizers import quantize
from mptrain.compress.weights.weight_only import compress
from mptrain.models.load import load_model
from mptrain.recipe import Model, Ptq
from mptrain.recipe.weights import WeightOnly


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    tiny.save_bert(folder / "plain")
    model = load_model(Model(path=str(folder / "plain"), task="text-classification"), ["a", "b"], seed=0)
    batches = [{"input_ids": torch.randint(5, 15, (8, 12)), "attention_mask": torch.ones(8, 12, dtype=torch.long)}]
    mptrain.save(quantize(model, Ptq(mode="ptq"), batches), folder / "int8", tiny.tokenizer())
    (folder / "texts.txt").write_text("good film\nbad plot was not so good\n" * 8)
    return folder


def export(capsys, *words):
    status = main(["export", *map(str, words)])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_a_model_becomes_openvino_and_agrees(bert, tmp_path, capsys):
    facts = tmp_path / "facts.json"
    words = (bert / "plain", "--to", tmp_path / "ov", "--data", bert / "texts.txt", "--json", facts)
    status, out, err = export(capsys, *words)
    assert status == 0, err
    assert "largest difference" in out and "16 inputs (texts.txt)" in out
    found = json.loads(facts.read_text())
    assert found["parity"]["max_abs_diff"] < 1e-5 and found["passed"] and found["parity"]["examples"] == 16
    assert {p.name for p in (tmp_path / "ov").iterdir()} >= {"openvino_model.xml", "config.json", "tokenizer.json"}


def test_a_quantized_model_keeps_its_integers(bert, tmp_path, capsys):
    facts = tmp_path / "facts.json"
    words = (bert / "int8", "--precision", "int8", "--to", tmp_path / "ov", "--json", facts)
    status, _, err = export(capsys, *words, "--data", bert / "texts.txt")
    assert status == 0, err
    assert json.loads(facts.read_text())["runtime"]["weight_types"]["i8"] > 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--precision", "nf4"], "--precision nf4: 16 levels spaced as a normal distribution; mptrain has no method"),
        (["--precision", "int8"], "int8 post-training quantization calibrates on real inputs; give --data FILE"),
        (["--precision", "int8_emb4"], "needs a model with fake quantizers, and this one has none: quantize it first"),
        (["--precision", "compressed"], "models with weights compressed to integers, and no others"),
        (["--precision", "int8", "--format", "onnx"], "give --data FILE"),
        (["--precision", "compressed", "--format", "onnx"], "models with weights compressed to integers"),
        (["--precision", "int4", "--group-size", "24"], "block_size 24 does not divide 32 columns"),
        (["--precision", "int4", "--method", "best"], "--precision int4 with --method: method: Input should be 'rtn'"),
        (["--precision", "int4", "--method", "gptq"], "give --data FILE, texts or a recipe whose `data:` is used, or"),
        (["--precision", "int4", "--set", "symetric=false"], "--precision int4 with --set: symetric: Extra inputs"),
        (["--precision", "int4", "--set", "convolutions=same", "--format", "coreml"], "quantize.convolutions at int8"),
        (["--precision", "palette4", "--method", "skm"], "needs labelled data, which a recipe has"),
        (["--precision", "fp16", "--group-size", "32"], "--group-size: says how to compress, which --precision fp16"),
        (["--calibration", "0"], "--calibration must be at least 1"),
        (["--precision", "int3"], "precision"),
        (["--format", "tflite"], "'openvino', 'coreml'"),
        (["--target", "iOS18"], "minimum_deployment_target"),
        (["--task", "poetry"], "--task must be one of"),
        (["--json", "nowhere/facts.json"], "there is no folder"),
    ],
)
def test_wrong_options_are_errors_and_write_nothing(bert, tmp_path, capsys, words, expected):
    status, _, err = export(capsys, bert / "plain", "--to", tmp_path / "ov", *words)
    assert status == 2 and expected in err
    assert not (tmp_path / "ov").exists()


@pytest.mark.parametrize(
    ("format", "words", "stored"),
    [
        ("openvino", ["--precision", "int8", "--set", "reduce_range=true"], {"i8"}),
        ("openvino", ["--precision", "int8-weights"], {"i8"}),
        ("openvino", ["--precision", "int4", "--group-size", "8", "--set", "symmetric=false"], {"u4", "i8"}),
        ("onnx", ["--precision", "int8", "--set", "reduce_range=true"], {"int8"}),
        pytest.param("onnx", ["--precision", "int4", "--method", "rtn"], {"uint4", "int8"}, marks=pytest.mark.long),
        pytest.param("coreml", ["--precision", "palette4"], {"uint4"}, marks=pytest.mark.long),
        pytest.param("coreai", ["--precision", "int4"], {"int4", "int8"}, marks=pytest.mark.long),
    ],
)
def test_a_word_compresses_a_plain_model_first(bert, tmp_path, capsys, format, words, stored):
    facts = tmp_path / "facts.json"
    data = ("--data", bert / "texts.txt", "--calibration", 8, "--samples", 8, "--json", facts)
    status, out, err = export(capsys, bert / "plain", "--to", tmp_path / "to", "--format", format, *words, *data)
    assert status == 0, err
    found = json.loads(facts.read_text())
    change = found["compressed"]["change"]
    assert found["parity"]["relative"] < 0.02 and 1e-6 < change["relative"] < 0.5, "it was rounded, and is that model"
    assert "Against the model before it was compressed" in out
    assert stored <= {name.lower() for name in found["runtime"]["weight_types"]}
    card = (tmp_path / "to" / "README.md").read_text()
    assert found["compressed"]["how"] in card and "Accuracy was not measured" in card


def test_the_block_is_chosen_for_each_weight_and_said(bert, tmp_path, capsys):
    status, out, err = export(capsys, bert / "plain", "--precision", "int4", "--to", tmp_path / "ov")
    assert status == 0, err
    assert "int4 weights (rtn, per block of up to 64)" in out  # without data no search
    assert "Stored: 4 bits, blocks of 32: 12 weights; 8 bits, blocks of 32: 3 weights; 4 bits, blocks of 64: 2" in out


@pytest.mark.parametrize(("precision", "kind", "share"), [("int8-weights", "i8", 0.3), ("int4", "i4", 0.2)])
def test_a_convolutional_network_is_a_fraction_of_its_size(tmp_path, capsys, precision, kind, share):
    pictures.save("resnet", tmp_path / "resnet")
    facts = tmp_path / "facts.json"
    more = ("--set", "convolutions=same") if precision == "int4" else ()
    words = ("--precision", precision, "--to", tmp_path / "ov", "--samples", 8, "--json", facts)
    status, _, err = export(capsys, tmp_path / "resnet", *words, *more)
    assert status == 0, err
    found = json.loads(facts.read_text())
    assert found["parity"]["max_abs_diff"] < 1e-4 and 1e-6 < found["compressed"]["change"]["relative"] < 0.5
    types = found["runtime"]["weight_types"]
    covered = found["compressed"]["methods"]["quantize"]["coverage"]
    assert covered["covered"] > 0.9 and not any("Conv2d.weight" in left for left in covered["left"])
    assert types[kind] * (8 / int(kind[1])) == pytest.approx(covered["covered"] * found["fp32_bytes"] / 4, rel=0.01)
    assert sum(types.values()) < share * found["fp32_bytes"]


@pytest.mark.long
def test_a_model_that_is_compressed_is_not_compressed_again(bert, tmp_path, capsys):
    model = load_model(Model(path=str(bert / "plain"), task="text-classification"), ["a", "b"], seed=0)
    compress(model, WeightOnly(mode="weight_only", method="rtn", block_size=16))
    mptrain.save(model, tmp_path / "int4", tiny.tokenizer())
    status, _, err = export(capsys, tmp_path / "int4", "--precision", "int4", "--to", tmp_path / "ov")
    assert status == 2 and "are compressed already" in err
    words = (bert / "int8", "--precision", "int8", "--data", bert / "texts.txt", "--to", tmp_path / "ml")
    status, out, err = export(capsys, *words, "--format", "coreml")
    assert status == 0 and "before it was compressed" not in out, err  # its own quantizers, not new ones


def test_a_folder_that_is_there_is_left_alone(bert, tmp_path, capsys):
    (tmp_path / "ov").mkdir()
    status, _, err = export(capsys, bert / "plain", "--to", tmp_path / "ov")
    assert status == 2 and "exists already" in err


def test_a_difference_is_exit_status_3(bert, tmp_path, capsys, monkeypatch):
    compared = {"max_abs_diff": 0.5, "relative": 0.5, "agreement": 0.5, "examples": 4, "numbers": True}
    monkeypatch.setattr(single.parity, "compare", lambda *_, **__: compared)
    status, _, err = export(capsys, bert / "plain", "--to", tmp_path / "ov")
    assert status == 3 and "differs from the torch model" in err


def test_a_folder_of_compressed_weights_is_exported_as_it_is(bert, tmp_path, capsys):
    model = load_model(Model(path=str(bert / "plain"), task="text-classification"), ["a", "b"], seed=0)
    compress(model, WeightOnly(mode="weight_only", method="rtn", block_size=16))
    mptrain.save(model, tmp_path / "int4", tiny.tokenizer())
    status, _, err = export(capsys, tmp_path / "int4", "--precision", "compressed", "--to", tmp_path / "ov")
    assert status == 0, err
