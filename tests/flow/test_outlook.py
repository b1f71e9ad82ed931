"""What a dry run predicts, against what is known of the model."""

from __future__ import annotations

import pytest
from kit import tiny

from mptrain.compress.weights import records
from mptrain.compress.weights.weight_only import compress
from mptrain.flow.inputs import read_architecture
from mptrain.flow.outlook import Outlook
from mptrain.models.load import load_model
from mptrain.recipe import Recipe
from mptrain.recipe.plan import phases, variants

TRAIN = {"epochs": 1, "lr": 1e-3, "batch_size": 8}


def outlook(folder, *stages, precision=("fp32", "int8", "int8_emb4", "compressed")):
    described = tiny.jpqd(folder)
    described["stages"] = [{"id": "dense", "train": TRAIN}, *stages]
    described["export"][0] |= {"of": ["dense", *(s["id"] for s in stages)], "precision": list(precision)}
    recipe = Recipe.model_validate(described)
    return Outlook(recipe, read_architecture(recipe).model, None)


def sizes_of(found):
    return {planned.id: found.bytes(planned) for planned in variants(found.recipe)}


def test_a_dense_model_has_its_parameters(tmp_path):
    found = outlook(tmp_path)
    model = load_model(found.recipe.model, None, seed=0)
    assert found.dense.params == sum(p.numel() for p in model.parameters())
    assert sizes_of(found)["baseline_fp32"] == 4 * found.dense.params


def test_a_stage_after_one_that_prunes_has_what_that_one_left(tmp_path):
    half = {"id": "half", "prune": {"method": "magnitude", "keep": {"encoder_params": 0.5}}}
    more = {"id": "more", "train": TRAIN}
    found = outlook(tmp_path, half, more)
    assert found.sizes("half") == found.sizes("more") == found.dense.kept(0.5)
    seconds = {s.id: sum(found.seconds(s, p) for p in phases(s, 100)) for s in found.recipe.stages}
    assert seconds["more"] == pytest.approx(seconds["dense"] / 2)


def test_a_budget_against_an_earlier_stage_is_a_part_of_that(tmp_path):
    half = {"id": "half", "prune": {"method": "magnitude", "keep": {"speedup": 2.0}}}
    more = {"id": "more", "prune": {"method": "magnitude", "keep": {"speedup": 4.0, "against": "dense"}}}
    found = outlook(tmp_path, half, more)
    assert (found.sizes("half"), found.sizes("more")) == (found.dense.kept(0.5), found.dense.kept(0.25))


def test_masks_save_no_time_before_they_are_cut(tmp_path):
    prune = {"method": "magnitude", "keep": {"encoder_params": 0.25}, "schedule": {"end": 0.5}}
    found = outlook(tmp_path, {"id": "small", "train": TRAIN, "prune": prune, "quantize": {"mode": "qat"}})
    stage = found.recipe.stage("small")
    warmup, finetune = (found.seconds(stage, phase) / phase.steps for phase in phases(stage, 160))
    assert finetune == pytest.approx(warmup / 4)


@pytest.mark.parametrize(("embeddings", "of_embeddings"), [("int8", 1.0), ("fp32", 4.0)])
def test_embeddings_that_stay_fp32_count_as_such(tmp_path, embeddings, of_embeddings):
    found = outlook(tmp_path, {"id": "q", "quantize": {"mode": "ptq", "embeddings": embeddings}})
    dense, sizes = found.dense, sizes_of(found)
    assert sizes["q_int8"] == dense.layers + dense.other + of_embeddings * dense.embeddings
    assert sizes["q_int8_emb4"] == dense.layers + dense.other + (0.5 + 2 / 64) * dense.embeddings


def test_integers_come_to_about_what_their_records_hold(tmp_path):
    how = {"mode": "weight_only", "method": "rtn", "block_size": 16, "embeddings": "same"}
    found = outlook(tmp_path, {"id": "q", "quantize": how})
    model = load_model(found.recipe.model, None, seed=0)
    compress(model, found.recipe.stage("q").quantize)
    held = records.of(model)
    stored = sum(row["bytes"] for row in records.describe(held))
    floats = sum(p.numel() for name, p in model.named_parameters() if name not in held)
    assert sizes_of(found)["q_compressed"] == pytest.approx(stored + 4 * floats, rel=0.25)


def test_tables_come_to_what_is_stored_of_them(tmp_path):
    how = {"method": "kmeans", "bits": 2, "granularity": "tensor"}
    found = outlook(tmp_path, {"id": "t", "palettize": how})
    (tables,) = found.tables()["t"]
    assert tables.bits == "2" and tables.layers > 10
    # OpenVINO writes them out
    assert sizes_of(found)["t_fp32"] == 4 * found.dense.params
