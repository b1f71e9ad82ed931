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


PATCHES = """
import torch
from torch import nn


class Patches(nn.Module):
    def __init__(self, num_labels, rank):
        super().__init__()
        self.rank, self.patch = rank, nn.Linear(48, 32)
        self.one, self.two, self.norm = nn.Linear(32, 64), nn.Linear(64, 32), nn.LayerNorm(32)
        self.out = nn.Linear(32, num_labels)

    def forward(self, pixel_values):
        batch = pixel_values.shape[0]
        if self.rank > 5:
            x = pixel_values.reshape(batch, 3, 4, 4, 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(batch, 16, 48)
        else:
            x = pixel_values.flatten(2).transpose(1, 2).reshape(batch, 16, 48)
        x = self.patch(x)
        x = x + self.two(torch.relu(self.one(self.norm(x))))
        return {"logits": self.out(x.mean(1))}


def patches(num_labels, rank=3):
    return Patches(num_labels, rank)
"""


def of_patches(described, tmp_path, **arguments):
    (tmp_path / "net.py").write_text(PATCHES)
    described["model"] |= {"module": f"{tmp_path / 'net.py'}:patches", "arguments": arguments}
    return described


@pytest.mark.long
def test_every_method_and_every_format_takes_a_network_of_ones_own(described, tmp_path):
    train = {"epochs": 1, "lr": 1e-3, "batch_size": 16}
    weights = {"mode": "weight_only", "bits": 8, "granularity": "channel"}
    blocks = {"mode": "weight_only", "bits": 4, "block_size": 16, "method": "gptq"}
    of_patches(described, tmp_path)["stages"] = [
        described["stages"][0],
        {"id": "qat", "teacher": "dense", "distill": {"weight": 0.5}, "train": train, "quantize": {"mode": "qat"}},
        {"id": "eight", "from": "dense", "quantize": weights},
        {"id": "four", "from": "dense", "quantize": blocks},
        {"id": "tables", "from": "dense", "palettize": {"method": "kmeans", "bits": 4}},
        {"id": "trained", "from": "dense", "train": train, "palettize": {"method": "skm", "bits": 4}},
        {"id": "half", "from": "dense", "train": train},
    ]
    numbers, tables = ["dense", "qat", "eight", "four"], ["tables", "trained"]
    described["precision"] = {"compute": "bf16"}
    described["export"] = [
        {"id": "ov", "format": "openvino", "of": [*numbers, "half"], "precision": ["fp32", "int8", "compressed"]},
        {"id": "onnx", "format": "onnx", "of": numbers},
        {"id": "cml", "format": "coreml", "of": [*numbers, *tables]},
        {"id": "cai", "format": "coreai", "of": [*numbers, *tables]},
    ]
    (tmp_path / "own.yaml").write_text(json.dumps(described))
    run(tmp_path / "own.yaml", "--allow-code")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    found = {variant["id"]: variant for variant in report["variants"]}
    assert len(found) == 5 + 4 + 2 * 2 * 6
    assert all(variant["parity"]["relative"] < 1e-4 for name, variant in found.items() if "cml_fp32" in name)
    for name in ("eight", "four", "tables"):
        kinds = [variant for key, variant in found.items() if key.startswith(f"{name}_")]
        assert all(variant["size_bytes"] < found["baseline_fp32"]["size_bytes"] for variant in kinds), name


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of coremltools' folder
def test_what_core_ml_cannot_hold_is_said_before_training(described, tmp_path):
    described["export"] = [{"id": "cml", "format": "coreml", "of": ["dense"]}]
    of_patches(described, tmp_path, rank=6)["stages"] = described["stages"][:1]
    with pytest.raises(ModelError, match=r"export\.cml: Core ML .* rank <= 5"):
        preflight.check(file.validate(described, "test"), allow_code=True)


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
    left = found["found_int8"]["runtime"]["left_in_float"]
    assert list(left) == ["module.gem"] and "__module.module.gem/aten::mean/ReduceMean" in left["module.gem"]
    assert "left_in_float" not in found["ptq_int8"]["runtime"]
