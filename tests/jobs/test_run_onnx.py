"""A recipe with ONNX exports of an encoder and a decoder, from training to the report."""

from __future__ import annotations

import json

import pytest
from kit.jobs import run


@pytest.mark.long
def test_the_bundled_encoder_decoder_runs_as_its_tiny_preset(tmp_path):
    run("onnx-fp16-seq2seq", "--set", "preset=tiny", "--set", f"output.dir={tmp_path / 'run'}")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {gate["name"]: gate["passed"] for gate in report["gates"]} == {
        "parity": True,
        "agreement": True,
        "fused_attention": True,
        "max_casts": True,
    }
    rows = {v["id"]: v for v in report["variants"]}
    assert list(rows) == ["baseline_onnx_fp32", "baseline_onnx_fp16", "ptq_onnx_int8"]
    for row in rows.values():
        assert tuple(row["metrics"]) == ("rouge_l", "chrf", "exact_match", "loss")
        folder = (tmp_path / "run" / row["path"]).parent
        assert {file.name for file in folder.glob("*.onnx")} == {"encoder_model.onnx", "decoder_model.onnx"}
    runtime = rows["ptq_onnx_int8"]["runtime"]
    assert len(runtime["int8_layers"]) > 20 and all("encoder_attn" in name for name in runtime["fp32_layers"])
