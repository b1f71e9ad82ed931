"""A recipe that exports to Core ML beside OpenVINO, as a user runs it."""

from __future__ import annotations

import json

import pytest
import tiny
from test_run import run

COREML = {
    "id": "coreml",
    "format": "coreml",
    "of": ["dense"],
    "precision": ["fp32", "fp16"],
    "shapes": {"kind": "ranged", "batch": [1, 64], "length": [1, 32]},
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coreml")
    recipe = tiny.jpqd(folder)
    recipe["stages"] = [{**recipe["stages"][0], "train": {"epochs": 2, "lr": 3e-3, "batch_size": 8}}]
    recipe["export"] = [{"id": "ov", "format": "openvino", "of": ["dense"], "precision": ["fp32"]}, COREML]
    run(tiny.write(recipe, folder / "tiny.yaml"))
    return json.loads((folder / "run" / "report.json").read_text()), folder / "run"


def test_core_ml_variants_are_scored_by_the_interpreter_and_not_timed(report):
    found, folder = report
    variants = {v["id"]: v for v in found["variants"]}
    assert list(variants) == ["baseline_fp32", "baseline_coreml_fp32", "baseline_coreml_fp16"]
    for name in ("baseline_coreml_fp32", "baseline_coreml_fp16"):
        variant = variants[name]
        package = folder / variant["path"]
        assert variant["size_bytes"] == sum(f.stat().st_size for f in package.rglob("*") if f.is_file())
        assert variant["latency_ms"] == {} and "emulation" in variant["runtime"]["emulated"]
        assert variant["metrics"]["accuracy"]["n"] == variants["baseline_fp32"]["metrics"]["accuracy"]["n"]
    exact, half = variants["baseline_coreml_fp32"], variants["baseline_coreml_fp16"]
    assert exact["metrics"]["accuracy"] == variants["baseline_fp32"]["metrics"]["accuracy"]
    assert exact["parity"]["max_abs_diff"] < 1e-5 < half["parity"]["max_abs_diff"] < 0.05
    assert set(exact["runtime"]["weight_types"]) == {"float32"}
    assert next(iter(half["runtime"]["weight_types"])) == "float16"
    assert half["size_bytes"] < exact["size_bytes"] - sum(exact["runtime"]["weight_types"].values()) / 3
    assert {c["id"] for c in found["comparisons"]} == {"baseline_coreml_fp32", "baseline_coreml_fp16"}
    assert all(gate["passed"] for gate in found["gates"])
    assert found["versions"]["coremltools"]


def test_the_pages_are_rendered(report):
    _, folder = report
    assert "baseline_coreml_fp16" in (folder / "report.md").read_text()
