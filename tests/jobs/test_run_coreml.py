"""A recipe that exports to Core ML beside OpenVINO, as a user runs it."""

from __future__ import annotations

import json

import pytest
import torch
from kit import tiny
from kit.jobs import run

from mptrain.compress.weights import records
from mptrain.export.torch.stored_weights import stored_weights
from mptrain.mil.interpreter import weights
from mptrain.mil.program import Name, read_program
from mptrain.models import artifact

pytestmark = pytest.mark.long

SHAPES = {"kind": "ranged", "batch": [1, 64], "length": [1, 32]}
EXPORTS = [
    {"id": "ov", "format": "openvino", "of": ["dense"], "precision": ["fp32"]},
    {"id": "coreml", "format": "coreml", "of": ["dense"], "precision": ["fp32"], "shapes": SHAPES},
    {"id": "phone", "format": "coreml", "of": ["jpqd"], "precision": ["fp16"], "shapes": SHAPES},
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coreml")
    recipe = tiny.jpqd(folder)
    for stage, epochs in zip(recipe["stages"], (1, 2)):
        stage["train"] |= {"epochs": epochs, "batch_size": 32}
    recipe["export"] = EXPORTS
    run(tiny.write(recipe, folder / "tiny.yaml"))
    return json.loads((folder / "run" / "report.json").read_text()), folder / "run"


def test_core_ml_variants_are_scored_by_the_interpreter_and_not_timed(report):
    found, folder = report
    variants = {v["id"]: v for v in found["variants"]}
    assert list(variants) == ["baseline_fp32", "baseline_coreml_fp32", "jpqd_phone_fp16"]
    for name in ("baseline_coreml_fp32", "jpqd_phone_fp16"):
        variant = variants[name]
        package = folder / variant["path"]
        assert variant["size_bytes"] == sum(f.stat().st_size for f in package.rglob("*") if f.is_file())
        assert variant["latency_ms"] == {} and "emulation" in variant["runtime"]["emulated"]
        assert variant["metrics"]["accuracy"]["n"] == variants["baseline_fp32"]["metrics"]["accuracy"]["n"]
    exact, half = variants["baseline_coreml_fp32"], variants["jpqd_phone_fp16"]
    assert exact["metrics"]["accuracy"] == variants["baseline_fp32"]["metrics"]["accuracy"]
    assert exact["parity"]["max_abs_diff"] < 1e-5 and set(exact["runtime"]["weight_types"]) == {"float32"}
    assert half["runtime"]["half"]["said"] == "0 ops in FP32; 0 float↔half casts"
    assert {c["id"] for c in found["comparisons"]} == {"baseline_coreml_fp32", "jpqd_phone_fp16"}
    gates = {gate["name"]: gate for gate in found["gates"]}
    assert gates["parity"]["passed"] and gates["fused_attention"]["passed"]
    assert found["versions"]["coremltools"]


def test_the_package_of_jpqd_holds_the_integers_that_training_learned(report):
    found, folder = report
    stage = next(s for s in found["recipe"]["stages"] if s["id"] == "jpqd")
    model = artifact.load(folder / found["checkpoints"]["jpqd"])
    learned = records.distinct(records.of(stored_weights(model, "int8")))
    assert stage["quantize"]["embeddings"] == "int8" and any("word_embeddings" in name for name in learned)
    (variant,) = (v for v in found["variants"] if v["stage"] == "jpqd")
    assert next(iter(variant["runtime"]["weight_types"])) == "int8"
    assert "activations" in variant["runtime"]["dropped"] and variant["runtime"]["stored_as_floats"] == {}
    assert variant["parity"]["max_abs_diff"] < 0.05
    program = read_program(folder / variant["path"])
    data = [operation.inputs["data"][0] for operation, _ in weights(program)]
    stored = [program.constants[d.name] if isinstance(d, Name) else d for d in data]
    assert len(stored) == len(learned)
    for record in learned.values():
        assert any(torch.equal(found, record.q.long()) for found in stored if found.shape == record.q.shape)


def test_the_pages_are_rendered(report):
    _, folder = report
    assert "jpqd_phone_fp16" in (folder / "report.md").read_text()
