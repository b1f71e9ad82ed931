"""A run that leaves whole blocks out, then quantizes: what it says before, in its report, and what it ships."""

from __future__ import annotations

import json

from kit import tiny
from kit.jobs import run

import mptrain
from mptrain.compress.structure.dropped import Constant


def described(folder, keep, **changes):
    found = tiny.jpqd(folder)
    prune = {"method": "curvature", "keep": keep, "min_ffn": 8, "round_ffn": 8, **changes}
    found["stages"] = [
        found["stages"][0],
        {"id": "gone", "prune": prune},
        {"id": "int8", "quantize": {"mode": "ptq", "reduce_range": True}},
    ]
    found["export"] = [
        {"id": "ov", "format": "openvino", "of": ["dense", "gone", "int8"], "precision": ["fp32", "int8"]},
        {"id": "ort", "format": "onnx", "of": ["gone"]},
    ]
    return found


def test_a_run_without_some_of_its_blocks(tmp_path):
    run(tiny.write(described(tmp_path, {"encoder_params": 0.1}, drop=True), tmp_path / "recipe.yaml"))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    gone = [block["name"] for block in report["structure"]["blocks"] if not block["kept"]]
    assert gone and report["methods"]["gone"]["facts"]["prune"]["curvature"]["dropped"] == gone
    page = (tmp_path / "run" / "report.md").read_text()
    assert "Left out whole, a constant stands for each: bert." in page
    model = mptrain.load(tmp_path / "run" / report["checkpoints"]["int8"])
    assert sum(isinstance(module, Constant) for module in model.modules()) == len(gone)
    found = {v["id"]: v for v in report["variants"]}
    assert set(found) == {"baseline_fp32", "gone_fp32", "int8_int8", "gone_ort_fp32"}
    for name in ("gone_fp32", "gone_ort_fp32"):
        assert found[name]["parity"]["max_abs_diff"] < 1e-4
    attentions = sum("attention" in name for name in gone)
    assert found["gone_fp32"]["runtime"]["attention_layers"] == 2 - attentions
    assert found["int8_int8"]["parity"]["agreement"] > 0.9


def test_what_cannot_be_is_said_before_anything_is_trained(tmp_path):
    found = described(tmp_path, {"encoder_params": 0.001}, drop=True)
    after = described(tmp_path, {"encoder_params": 0.5}, drop=True)
    after["stages"][1:] = reversed(after["stages"][1:])
    after["export"] = [{"id": "ov", "format": "openvino", "of": ["dense"]}]
    other = described(tmp_path, {"encoder_params": 0.5}, drop=True, method="fisher", schedule={"end": 0})
    for name, recipe, words in (
        ("least", found, "stages.gone.prune.keep.encoder_params: 0.001 cannot be reached"),
        ("quantized", after, "stages.gone.prune.drop: a model that carries quantizers cannot lose whole blocks"),
        ("fisher", other, "drop: is for method curvature"),
    ):
        file = tiny.write(recipe, tmp_path / f"{name}.yaml")
        assert words in " ".join(run(file, "--dry-run", check=2).stderr.split())
