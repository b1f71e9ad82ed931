"""Adapters of a stage: over rounded weights and rounded again, saved for peft, and refused beside other training."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from kit import tiny
from kit.jobs import run

import mptrain

ROUNDED = {"mode": "weight_only", "method": "rtn", "block_size": 16}


@pytest.fixture
def recipe(tmp_path):
    found = tiny.jpqd(tmp_path)
    train = {"epochs": 2, "lr": 3e-3, "batch_size": 8}
    found["stages"] = [
        found["stages"][0],
        {"id": "int4", "quantize": ROUNDED},
        {"id": "tuned", "adapters": {"rank": 4}, "train": train, "teacher": "dense", "distill": {"weight": 0.5}}
        | {"quantize": ROUNDED},
    ]
    found["export"] = [
        {"id": "ov", "format": "openvino", "of": ["dense", "tuned"], "precision": ["fp32", "compressed"]}
    ]
    return found


@pytest.mark.long
def test_adapters_train_over_rounded_weights_and_are_merged_and_rounded(recipe, tmp_path):
    run(tiny.write(recipe, tmp_path / "recipe.yaml"))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    facts = report["methods"]["tuned"]["facts"]["adapters"]
    assert facts["layers"] == 13 and 0 < facts["trained"] < 0.3 * facts["parameters"] and facts["rounded"] > 0
    (said,) = [note for note in report["notes"] if "adapters of 13 layers" in note]
    assert f"moved them by {100 * facts['rounded']:.0f}%" in said
    assert "adapters of rank 4, merged" in report["methods"]["tuned"]["words"]
    start, tuned = (mptrain.load(tmp_path / "run" / report["checkpoints"][id]) for id in ("int4", "tuned"))
    for name, before in start.named_parameters():
        changed = not torch.equal(before, tuned.get_parameter(name))
        assert changed == (
            (".weight" in name and any(x in name for x in ("query", "key", "value", "dense"))) or "classifier" in name
        ), name
    # what peft makes of the saved adapters on the model that the stage began with is what was rounded
    folder = tmp_path / "run" / report["checkpoints"]["tuned"] / "adapter"
    merged = peft.PeftModel.from_pretrained(start, folder).merge_and_unload()
    query = "bert.encoder.layer.0.attention.self.query.weight"
    rounding = (merged.get_parameter(query) - tuned.get_parameter(query)).abs()
    assert 0 < rounding.max() < 0.2 * merged.get_parameter(query).abs().max()
    assert torch.equal(merged.classifier.bias, tuned.classifier.bias)


def test_another_method_that_trains_needs_a_stage_of_its_own(recipe, tmp_path):
    recipe["stages"] = [recipe["stages"][0], {**recipe["stages"][2], "quantize": {"mode": "qat"}}]
    said = " ".join(run(tiny.write(recipe, tmp_path / "recipe.yaml"), "--dry-run", check=2).stderr.split())
    assert "adapters method lora and quantize mode qat would both change the weights in training" in said


def test_targets_are_names_of_linears(recipe, tmp_path):
    recipe["stages"][2]["adapters"]["targets"] = ["LayerNorm"]
    said = " ".join(run(tiny.write(recipe, tmp_path / "recipe.yaml"), "--dry-run", check=2).stderr.split())
    assert "adapters.targets: no Linear is among them" in said


@pytest.mark.parametrize("mode", ["qat", "ptq"])
def test_quantizers_of_activations_come_after_adapters(recipe, tmp_path, mode):
    recipe["stages"][1] = {"id": "int8", "quantize": {"mode": mode}}
    recipe["stages"][1] |= {"train": recipe["stages"][2]["train"]} if mode == "qat" else {}
    del recipe["stages"][2]["quantize"]
    said = " ".join(run(tiny.write(recipe, tmp_path / "recipe.yaml"), "--dry-run", check=2).stderr.split())
    assert "stages.tuned.from: 'int8' leaves quantizers of activations on the very layers" in said
    recipe["stages"][1:] = [{**recipe["stages"][2], "from": "dense"}, {**recipe["stages"][1], "from": "tuned"}]
    recipe["export"][0] |= {"of": ["dense", "int8"], "precision": ["fp32", "int8"]}
    run(tiny.write(recipe, tmp_path / "recipe.yaml"), "--dry-run")


def test_over_stored_integers_the_stage_has_to_round_anew(recipe, tmp_path):
    del recipe["stages"][2]["quantize"]
    said = " ".join(run(tiny.write(recipe, tmp_path / "recipe.yaml"), "--dry-run", check=2).stderr.split())
    assert "'int4' holds compressed weights" in said and "or give this stage quantize too, which acts after" in said
