"""`mptrain export`: one model, run again and compared, as a user calls it."""

from __future__ import annotations

import json

import pytest
import torch
from kit import tiny

import mptrain
from mptrain.cli import main
from mptrain.commands import export as single
from mptrain.compress.quantize.quantizers import quantize
from mptrain.models.load import load_model
from mptrain.recipe import Model, Ptq


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
        (["--precision", "int8"], "needs a model with fake quantizers, and this one has none: quantize it in a recipe"),
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


def test_a_folder_that_is_there_is_left_alone(bert, tmp_path, capsys):
    (tmp_path / "ov").mkdir()
    status, _, err = export(capsys, bert / "plain", "--to", tmp_path / "ov")
    assert status == 2 and "exists already" in err


def test_a_difference_is_exit_status_3(bert, tmp_path, capsys, monkeypatch):
    compared = {"max_abs_diff": 0.5, "relative": 0.5, "mean_abs_diff": 0.1, "agreement": 0.5, "examples": 4}
    monkeypatch.setattr(single.parity, "compare", lambda *_, **__: compared)
    status, _, err = export(capsys, bert / "plain", "--to", tmp_path / "ov")
    assert status == 3 and "differs from the torch model" in err
