"""A network in plain torch through a whole run: trained, its convolutions pruned, int8, exported and measured."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from kit import tiny_tasks
from kit.jobs import run

from mptrain.core.errors import ModelError, UserError
from mptrain.data.sources import cnn
from mptrain.flow import preflight
from mptrain.flow.identity import models
from mptrain.models import artifact
from mptrain.recipe import file


@pytest.fixture
def described(tmp_path):
    shutil.copy(cnn.__file__, tmp_path / "net.py")
    data = tiny_tasks.images(tmp_path)["data"]
    return {
        "schema": "mptrain/v1",
        "name": "own",
        "model": {
            "module": f"{tmp_path / 'net.py'}:resnet",
            "arguments": {"width": 8},
            "picture": {"size": 16},
            "task": "image-classification",
        },
        "data": data | {"calibration": {"samples": 32}},
        "stages": [
            {"id": "dense", "train": {"epochs": 1, "lr": 1e-2, "batch_size": 16}},
            {
                "id": "small",
                "train": {"epochs": 1, "lr": 5e-3, "batch_size": 16},
                "prune": {
                    "method": "fisher",
                    "keep": {"macs": 0.5},
                    "schedule": {"end": 0.5},
                    "min_ffn": 2,
                    "round_ffn": 2,
                },
            },
            {"id": "ptq", "quantize": {"mode": "ptq"}},
        ],
        "export": [
            {"id": "ov", "format": "openvino", "of": ["dense", "small", "ptq"], "precision": ["fp32", "int8"]},
            {"id": "onnx", "format": "onnx", "of": ["small"], "precision": ["fp32"]},
        ],
        "evaluate": {"latency": {"batch": [1], "threads": [1], "runs": 1}},
        "gates": {"fused_attention": None, "agreement": None},
        "output": {"dir": str(tmp_path / "run")},
    }


@pytest.mark.long
def test_half_of_the_multiply_adds_go_and_every_export_agrees(described, tmp_path):
    (tmp_path / "own.yaml").write_text(json.dumps(described))
    run(tmp_path / "own.yaml", "--allow-code")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    found = {variant["id"]: variant for variant in report["variants"]}
    assert list(found) == ["baseline_fp32", "small_fp32", "ptq_int8", "small_onnx_fp32"]
    dense, small = found["baseline_fp32"], found["small_fp32"]
    assert 0.4 < small["macs"] / dense["macs"] <= 0.5 and small["params"] < dense["params"]
    assert all(variant["parity"]["relative"] < 1e-4 for name, variant in found.items() if "fp32" in name)
    assert found["ptq_int8"]["runtime"]["weight_types"]["i8"] > 0
    folder = tmp_path / "run" / report["checkpoints"]["small"]
    model = artifact.load(folder, allow_code=True)
    assert sum(p.numel() for p in model.parameters()) == small["params"]
    assert model(torch.zeros(1, 3, 16, 16)).logits.shape == (1, 3)
    assert "auto_map" not in json.loads((tmp_path / "run/export/small_fp32/config.json").read_text())


def test_a_run_is_known_by_the_content_of_its_code(described, tmp_path):
    recipe = file.validate(described, "test")
    before = models(recipe, allow_code=True)
    (tmp_path / "net.py").write_text((tmp_path / "net.py").read_text() + "\n# changed\n")
    after = models(recipe, allow_code=True)
    assert list(before) == ["model.module"] and before != after


def test_curvature_refuses_convolutions_by_name_before_training(described):
    described["stages"][1]["prune"] = {"method": "curvature", "keep": {"macs": 0.5}}
    with pytest.raises(
        ModelError, match=r"curvature.*features\.3\.channels \(read by module\.features\.3\.second\.0, Conv2d\)"
    ):
        preflight.check(file.validate(described, "test"), allow_code=True)


def test_a_pattern_that_matches_no_module_is_said_before_training(described):
    described["stages"][1]["prune"]["ignore"] = ["feature"]
    with pytest.raises(UserError, match=r"stages\.small\.prune\.ignore: 'feature' matches no module.*'features'"):
        preflight.check(file.validate(described, "test"), allow_code=True)


@pytest.mark.long
def test_a_search_by_picture_with_int8_and_without_what_it_breaks(described, tmp_path):
    described["model"] |= {"module": f"{tmp_path / 'net.py'}:descriptors", "task": "image-embedding"}
    described["model"]["arguments"] = {"width": 4, "size": 8, "power": 6.0}
    quantize = {"mode": "ptq", "scheme": "convolutional"}
    described["stages"] = [
        {"id": "dense", "train": {"epochs": 2, "lr": 1e-2, "batch_size": 16}},
        {"id": "ptq", "quantize": quantize},
        {"id": "found", "from": "dense", "quantize": quantize | {"ignore": ["gem"]}},
    ]
    described["export"] = [described["export"][0] | {"of": ["dense", "ptq", "found"]}]
    (tmp_path / "own.yaml").write_text(json.dumps(described))
    run(tmp_path / "own.yaml", "--allow-code")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["metric"]["name"] == "ndcg@10"
    assert {"mrr", "recall@1", "recall@5", "recall@10"} < set(report["variants"][0]["metrics"])
    found = {variant["id"]: variant for variant in report["variants"]}
    assert found["baseline_fp32"]["parity"]["relative"] < 1e-4
    assert all(found[name]["runtime"]["weight_types"]["i8"] > 0 for name in ("ptq_int8", "found_int8"))
