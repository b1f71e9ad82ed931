"""A recipe that exports to Core AI beside OpenVINO, as a user runs it: every asset is executed."""

from __future__ import annotations

import json

import pytest
from kit import tiny
from kit.jobs import run

from mptrain.export.coreai.emulated import EmulatedAsset, computes_half
from mptrain.export.coreai.runner import Asset

pytestmark = pytest.mark.long
COREAI = {"id": "coreai", "format": "coreai", "of": ["dense", "jpqd"], "precision": ["fp32", "fp16"]}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coreai")
    recipe = tiny.jpqd(folder)
    recipe["export"] = [
        {"id": "ov", "format": "openvino", "of": ["dense", "jpqd"], "precision": ["fp32", "int8"]},
        COREAI,
    ]
    run(tiny.write(recipe, folder / "tiny.yaml"))
    return json.loads((folder / "run" / "report.json").read_text()), folder / "run"


def test_core_ai_variants_are_scored_by_executing_them(report):
    found, folder = report
    variants = {v["id"]: v for v in found["variants"]}
    names = [f"{stage}_coreai_{precision}" for stage in ("baseline", "jpqd") for precision in ("fp32", "fp16")]
    assert [name for name in variants if "coreai" in name] == names
    for name in names:
        variant = variants[name]
        asset = folder / variant["path"]
        assert asset.name == "model.aimodel"
        assert variant["size_bytes"] == sum(f.stat().st_size for f in asset.rglob("*") if f.is_file())
        emulated = name.endswith("fp16") and not computes_half()
        assert variant["latency_ms"] == {}
        assert variant["runtime"]["execution"] == (EmulatedAsset if emulated else Asset).execution
        assert variant["metrics"]["accuracy"]["n"] == variants["baseline_fp32"]["metrics"]["accuracy"]["n"]
        half = variant["runtime"].get("half")
        assert (half is None) == name.endswith("fp32")
        assert half is None or half["executed"]["cosine"] > 0.999
    exact, quantized = variants["baseline_coreai_fp32"], variants["jpqd_coreai_fp32"]
    assert exact["metrics"]["accuracy"] == variants["baseline_fp32"]["metrics"]["accuracy"]
    assert exact["parity"]["max_abs_diff"] < 1e-5 and quantized["parity"]["max_abs_diff"] < 1e-5
    assert variants["jpqd_coreai_fp16"]["parity"]["max_abs_diff"] < 0.05
    assert list(exact["runtime"]["weight_types"]) == ["Float32"]
    assert quantized["runtime"]["weight_types"]["Int8"] > quantized["runtime"]["weight_types"]["Float32"]
    assert quantized["runtime"]["fused_attention"] == exact["runtime"]["fused_attention"] == 2
    assert all(gate["passed"] for gate in found["gates"] if gate["name"] == "parity")
    assert {"coreai-core", "coreai-torch", "coreai-opt"} <= found["versions"].keys()


def test_the_pages_say_what_was_executed_and_what_stays_in_fp32(report):
    text = (report[1] / "report.md").read_text()
    assert "## Kept in fp32" in text and "scored by Core AI's runtime" in text
    assert "Kept in fp32" in (report[1] / "report.html").read_text()
