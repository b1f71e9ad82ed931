"""What a dry run predicts where an input is no text: multiply-adds of the pictures and sounds as they are."""

from __future__ import annotations

import pytest
import torch
from kit import tiny, tiny_tasks
from torch.utils.flop_counter import FlopCounterMode
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

from mptrain.commands import dry_run as plan
from mptrain.compress.structure import costs
from mptrain.compress.structure.find import find_structure
from mptrain.core.errors import UserError
from mptrain.flow import preflight
from mptrain.flow.outlook import Outlook
from mptrain.models.load import load_model
from mptrain.recipe import Recipe


def predicted(content, known=True):
    """Multiply-adds for one input, from the model without weights; known: its data is here."""
    recipe = Recipe.model_validate(content)
    assert "baseline_fp32" in plan.dry_run(recipe)
    found = preflight.check(recipe, offline=True)
    return Outlook(recipe, found.architecture.model, found.data if known else None).dense.macs


@pytest.mark.parametrize("task", ["image-classification", "audio-classification"])
def test_multiply_adds_are_those_of_an_input_of_the_data(task, tmp_path):
    """A picture was taken for 197 tokens, and a sound for as many tokens as it has samples."""
    content = tiny_tasks.recipe(task, tmp_path)
    recipe = Recipe.model_validate(content)
    model = load_model(recipe.model, None, seed=0)
    structure = find_structure(model)
    inputs = {"pixel_values": torch.randn(1, 3, 16, 16)} if recipe.model.kind.unit is None else None
    inputs = inputs or {"input_values": torch.randn(1, 800)}
    rows = costs.layer_costs(structure, costs.measure_extents(model, structure, inputs))
    expected = sum(row["macs"] for row in rows)
    assert expected > 0 and predicted(content) == predicted(content, known=False) == expected


def test_a_convolutional_network_has_the_multiply_adds_of_its_convolutions(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    made = tiny_tasks.images(tmp_path)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 512, "width": 512}).save_pretrained(tmp_path / "model")
    content = tiny_tasks.recipe("image-classification", tmp_path / "other") | {
        "model": {"path": str(tmp_path / "model"), "task": "image-classification"},
        "data": made["data"],
        "stages": [{"id": "dense", "train": {"epochs": 1, "lr": 1e-3}}],
    }
    content["export"][0]["of"] = ["dense"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ResNetForImageClassification(config).eval()(pixel_values=torch.randn(1, 3, 512, 512))
    assert predicted(content) == counter.get_total_flops() // 2 > 1e7


def test_a_dry_run_says_what_training_in_half_takes(tmp_path):
    content = tiny.jpqd(tmp_path) | {"precision": "bf16-split-int8"}
    del content["stages"][1]["prune"]
    shown = " ".join(plan.dry_run(Recipe.model_validate(content)).split())
    assert "precision: bf16, split masters, int8 moments; training takes 0.0" in shown
    assert 8.03 < float(shown.split(" bytes a parameter)")[0].split("(")[-1]) < 8.5
    assert "bytes a parameter" not in plan.dry_run(Recipe.model_validate(content | {"precision": "fp32"}))


def test_a_dry_run_is_that_of_the_processes_that_would_be_launched(tmp_path):
    content = tiny.jpqd(tmp_path)
    del content["stages"][1]["prune"]
    shown = plan.dry_run(Recipe.model_validate(content), launch="accelerate-fsdp2-8gpu")
    rows = len(preflight.check(Recipe.model_validate(content), offline=True).data.train)
    assert "launch: 8 processes: FSDP2, each holds a part of the model; training takes" in " ".join(shown.split())
    assert f"0–{6 * (rows // 8 // 8)} " in shown, "six epochs of the dense stage"
    with pytest.raises(UserError, match=r"stages\.jpqd\.prune\.schedule: masks"):
        plan.dry_run(Recipe.model_validate(tiny.jpqd(tmp_path)), launch="accelerate-fsdp2-2gpu")
