"""The bundled recipes of heads in the graph and of models with code of their own, as a user tries them."""

from __future__ import annotations

import json

import pytest

from mptrain.cli import main

pytestmark = pytest.mark.long


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_gpt2_topk(here):
    assert main(["recipe", "gpt2-topk", "--set", "preset=tiny"]) == 0
    report = json.loads((here / "runs/gpt2-topk/report.json").read_text())
    plain, top = report["variants"]
    assert plain["metrics"]["perplexity"]["value"] > 1 and not top["metrics"]
    assert top["runtime"]["heads"] == ["topk 20", "softmax"] and top["parity"]["relative"] < 1e-4
    assert any("not scored" in note for note in report["notes"])


def test_custom_arch(here, capsys):
    words = ["recipe", "custom-arch", "--set", "preset=tiny"]
    assert main(words) == 2
    assert "modeling_aquila.py would run code" in capsys.readouterr().err
    assert main([*words, "--allow-code"]) == 0
    (variant,) = json.loads((here / "runs/custom-arch/report.json").read_text())["variants"]
    assert variant["parity"]["relative"] < 1e-4 and variant["runtime"]["cache"] == 128
    assert (here / "runs/custom-arch/export" / variant["id"] / "modeling_aquila.py").is_file()


def test_prune_cnn(here, capsys):
    words = ["recipe", "prune-cnn", "--set", "preset=tiny"]
    assert main(words) == 2
    assert "cnn.py:resnet would run code" in capsys.readouterr().err
    assert main([*words, "--allow-code"]) == 0
    found = {v["id"]: v for v in json.loads((here / "runs/prune-cnn/report.json").read_text())["variants"]}
    assert 0.45 < found["small_fp32"]["macs"] / found["baseline_fp32"]["macs"] <= 0.5
    assert found["small_fp32"]["parity"]["relative"] < 1e-4 and found["small_onnx_fp32"]["parity"]["relative"] < 1e-4


def test_ptq_retrieval(here):
    assert main(["recipe", "ptq-retrieval", "--set", "preset=tiny", "--allow-code"]) == 0
    report = json.loads((here / "runs/ptq-retrieval/report.json").read_text())
    found = {v["id"]: v["metrics"]["ndcg@10"]["value"] for v in report["variants"]}
    assert found["baseline_fp32"] - found["found_int8"] < 0.05 and "ptq_int8" in found


def test_dien_ctr(here, capsys):
    assert main(["recipe", "dien-ctr", "--set", "preset=tiny", "--allow-code"]) == 0
    report = json.loads((here / "runs/dien-ctr/report.json").read_text())
    found = {v["id"]: v for v in report["variants"]}
    auc = {name: v["metrics"]["auc"]["value"] for name, v in found.items()}
    assert 0.75 < auc["baseline_fp32"] < 0.89 and abs(auc["int8_compressed"] - auc["baseline_fp32"]) < 0.01
    assert found["baseline_fp32"]["runtime"]["loops"] == {"TensorIterator": 2}
    assert found["int8_onnx_compressed"]["runtime"]["operations"]["Loop"] == 2
    assert found["baseline_bf16_fp32"]["runtime"]["inference_precision"] in ("f32", "bf16")
    assert any("0.8746" in note for note in report["notes"])
