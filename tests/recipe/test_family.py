"""A family: one stage of the file, a stage of the recipe for each of its points."""

from __future__ import annotations

import pytest
from kit import bare
from kit.bare import TRAIN

from mptrain.core.errors import RecipeError
from mptrain.flow.stage_inputs import inputs_of
from mptrain.recipe import file
from mptrain.recipe.plan import variants

FAMILY = {
    "id": "p",
    "teacher": "self",
    "distill": {},
    "train": TRAIN,
    "prune": {"method": "magnitude", "keep": {"speedup": [2, 3, 4.5]}},
}


def recipe(*stages, of=("a", "p"), **changes):
    export = {"export": [{"id": "ov", "format": "openvino", "of": list(of)}]}
    return bare.recipe(*stages, **{**export, **changes})


def test_each_point_is_a_stage_that_starts_from_the_last():
    found = recipe(FAMILY)
    assert [stage.id for stage in found.stages] == ["a", "p-2x", "p-3x", "p-4.5x"]
    assert [found.start_of(stage) for stage in found.stages] == ["model", "a", "p-2x", "p-3x"]
    assert [stage.teacher for stage in found.stages[1:]] == ["a"] * 3
    assert [stage.prune.keep.of_export() for stage in found.stages[1:]] == [
        ("latency", pytest.approx(1 / x)) for x in (2, 3, 4.5)
    ]
    assert {stage.prune.against() for stage in found.stages[1:]} == {"a"}
    assert [planned.stage for planned in variants(found)] == ["a", "p-2x", "p-3x", "p-4.5x"]
    assert found.stage("p-4.5x").words()[0] == "magnitude pruning (4.5 times as fast)"


def test_what_a_family_counts_against_is_in_its_key():
    inputs = inputs_of(recipe(FAMILY))
    assert set(inputs["p-3x"].after) == {"p-2x", "a"} and inputs["p-3x"].against == "a"
    assert inputs["p-2x"].target.export.format == "openvino"


def test_a_number_is_no_family():
    found = recipe({**FAMILY, "prune": {"method": "magnitude", "keep": {"speedup": 2.0}}})
    assert [stage.id for stage in found.stages] == ["a", "p"] and found.stage("p").prune.against() is None


@pytest.mark.parametrize("points", [[2, 2], [3, 2], [0.5, 2], ["2"], [True]])
def test_points_that_are_none_are_refused(points):
    with pytest.raises(RecipeError, match=r"stages\.p\.prune\.keep\.speedup: a family is ascending numbers above 1"):
        recipe({**FAMILY, "prune": {"method": "magnitude", "keep": {"speedup": points}}})


def test_a_name_of_several_stages_is_refused():
    with pytest.raises(RecipeError, match=r"stages\.b\.from: 'p' is a family; give one of its stages, p-2x, p-3x"):
        recipe(FAMILY, {"id": "b", "from": "p", "train": TRAIN})


def test_errors_name_the_lines_of_the_file():
    text = """schema: mptrain/v1
name: x
model: {path: m, task: text-classification}
data: {train: t.csv}
stages:
  - id: p
    train: {epochs: 2, lr: 0.1}
    prune: {method: magnitude, keep: {speedup: [2, 3]}}
  - id: b
    train: {epochs: 2, lr: wrong}
export: [{id: ov, format: openvino, of: [p]}]
output: {dir: runs/x}
"""
    data, lines = file.parse(text, "x.yaml")
    with pytest.raises(RecipeError, match=r"x\.yaml:10: stages\.b\.train\.lr"):
        file.validate(data, "x.yaml", lines)


def test_against_is_an_earlier_stage():
    keep = {"latency": 0.5, "against": "later"}
    with pytest.raises(RecipeError, match=r"stages\.p\.prune\.keep\.against: 'later' is not 'model' or an earlier"):
        recipe({**FAMILY, "prune": {"method": "magnitude", "keep": keep}})
    with pytest.raises(RecipeError, match="against: is for latency, speedup and size"):
        recipe({**FAMILY, "prune": {"method": "magnitude", "keep": {"macs": 0.5, "against": "a"}}})
