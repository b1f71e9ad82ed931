"""A family: one stage of the file, a stage of the recipe for each of its points."""

from __future__ import annotations

import pytest
from kit import bare
from kit.bare import TRAIN

from mptrain.core.errors import RecipeError
from mptrain.flow.stage_inputs import inputs_of
from mptrain.recipe import file
from mptrain.recipe.family import RECOVERY
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


def test_what_is_measured_of_blocks_is_shared_by_what_is_exported_alike():
    """Points of a family are; a stage from the same start with other quantizers is another file."""
    qat = {"mode": "qat", "weights": "symmetric"}
    points = {**FAMILY, "quantize": qat}
    other = {**FAMILY, "id": "q", "from": "a", "quantize": qat | {"ignore": ["classifier"]}}
    export = [{"id": "ov", "format": "openvino", "of": ["a", "p", "q"], "precision": ["fp32", "int8"]}]
    found = {name: stage.counted() for name, stage in inputs_of(recipe(points, other, export=export)).items()}
    assert found["p-2x"] == found["p-3x"] == found["p-4.5x"] != found["q-2x"] == found["q-3x"]
    assert found["p-2x"].startswith("a ") and "classifier" in found["q-2x"]


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


@pytest.mark.parametrize(("given", "counted"), [("model", "model"), ("a", "a"), (None, "a"), ("b", "b")])
def test_a_family_counts_against_what_it_is_told_to(given, counted):
    keep = {"speedup": [2, 3], "against": given}
    found = recipe({"id": "b", "train": TRAIN}, {**FAMILY, "from": "a", "prune": {"method": "magnitude", "keep": keep}})
    assert [stage.prune.against() for stage in found.stages[2:]] == [counted] * 2


def test_what_a_budget_counts_against_is_one_stage():
    later = {"id": "b", "from": "p-2x", "prune": {"method": "magnitude", "keep": {"speedup": 5, "against": "p"}}}
    with pytest.raises(RecipeError, match=r"stages\.b\.prune\.keep\.against: 'p' is a family; give one of its stages"):
        recipe(FAMILY, later)


@pytest.mark.parametrize("of", [["a", ["p"]], ["a", {"p": 1}], ["a", 5, "p"]])
def test_exports_of_what_is_no_name_are_said_to_be_none(of):
    with pytest.raises(RecipeError, match=r"export\.ov\.of.*: input should be a valid string"):
        recipe(FAMILY, of=of)


@pytest.mark.parametrize("id", [None, 5, ["p"]])
def test_a_family_has_a_name(id):
    with pytest.raises(RecipeError, match=r"the family of speedup \[2, 3, 4\.5\] needs an id"):
        recipe({**FAMILY, "id": id})


def test_points_after_the_first_train_a_share_of_what_the_first_does():
    warm = {"method": "fisher", "schedule": {"start": 0.5, "end": 1}, "keep": {"speedup": [2, 3, 4]}}
    stage = {**FAMILY, "train": TRAIN | {"epochs": 2}, "prune": warm}
    found = recipe(stage)
    assert [one.train.epochs for one in found.stages[1:]] == [2, 2 * RECOVERY, 2 * RECOVERY]
    ends = [(one.prune.schedule.start, one.prune.schedule.end) for one in found.stages[1:]]
    assert ends == [(0.5, 1), (0.5 * RECOVERY, RECOVERY), (0.5 * RECOVERY, RECOVERY)]
    warm["keep"]["recovery"] = 1
    assert [one.train.epochs for one in recipe(stage).stages[1:]] == [2, 2, 2]
    assert all(one.prune.keep.recovery is None for one in recipe(stage).stages[1:])
    untrained = {"id": "p", "prune": {"method": "curvature", "keep": {"speedup": [2, 3]}}}
    assert [one.train for one in recipe(untrained).stages[1:]] == [None, None]
    untrained["prune"]["keep"]["recovery"] = 0.5
    with pytest.raises(RecipeError, match=r"stages\.p\.prune\.keep\.recovery: 0\.5 .* no train: give train, or drop"):
        recipe(untrained)


@pytest.mark.parametrize("share", [0, 1.5, "all", True, None])
def test_a_recovery_that_is_no_share_is_refused(share):
    keep = {"speedup": [2, 3], "recovery": share}
    with pytest.raises(RecipeError, match=r"stages\.p\.prune\.keep\.recovery: the share of train\.epochs"):
        recipe({**FAMILY, "prune": {"method": "magnitude", "keep": keep}})


def test_a_single_point_has_no_recovery():
    with pytest.raises(RecipeError, match=r"recovery: is of a family.*give train\.epochs"):
        recipe({**FAMILY, "prune": {"method": "magnitude", "keep": {"speedup": 2.0, "recovery": 0.5}}})


def test_a_point_cannot_be_set_alone():
    data = {"stages": [{"id": "p", "prune": {"keep": {"speedup": [1.5, 2]}}}]}
    with pytest.raises(RecipeError, match=r"no item with id 'p-1'.* points of a family come from 'p': set its fields"):
        file._override(data, "stages.p-1.5x.train.epochs=2")
