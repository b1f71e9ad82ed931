"""What a stage depends on: all that run_phase gets, the key of reuse, and what reuse takes."""

from __future__ import annotations

import ast
import dataclasses
import json
import logging
import typing
from pathlib import Path

import pytest
from kit import bare
from kit.bare import TRAIN
from pydantic import BaseModel

import mptrain.flow.context
import mptrain.flow.stage
import mptrain.flow.teacher
from mptrain.flow.context import Context
from mptrain.flow.identity import FORMAT
from mptrain.flow.reuse import take_stages
from mptrain.flow.stage_inputs import StageInputs, given, inputs_of
from mptrain.recipe import Recipe, Stage

FISHER = {"method": "fisher", "schedule": {"end": 0}}


def recipe(*stages, **changes):
    return bare.recipe(*stages, **{"export": [openvino("fp32")], **changes})


def openvino(*precision):
    return {"id": "ov", "format": "openvino", "of": ["a"], "precision": list(precision)}


def core_ml(target, of="b"):
    return {"id": "ml", "format": "coreml", "of": [of], "precision": ["fp32"], "minimum_deployment_target": target}


def evaluate(*threads, **more):
    return {"latency": {"threads": list(threads), **more}}


def identity(checked, **changes):
    stages = {stage: inputs.key() for stage, inputs in inputs_of(checked).items()}
    shared = {"data_hash": "h", "models": {}, "versions": {"torch": "2"}, "processes": 1}
    return {"format": FORMAT, "stages": stages} | shared | changes


def taken(tmp_path, before, now):
    """The stages that a run of identity `now` takes over of a run of identity `before`."""
    other, folder = tmp_path / "other", tmp_path / "this"
    folder.mkdir()
    for stage in before["stages"]:
        (other / "stages" / stage).mkdir(parents=True)
        (other / "stages" / stage / "done.json").write_text("{}")
    (other / "run.json").write_text(json.dumps(before))
    take_stages(folder, json.loads(json.dumps(now)), [other])
    found = sorted(p.name for p in folder.glob("stages/*"))
    assert all((folder / "stages" / stage / "done.json").is_file() for stage in found)
    return found


@pytest.mark.parametrize("module", [mptrain.flow.context, mptrain.flow.stage, mptrain.flow.teacher])
def test_a_phase_gets_no_more_of_a_recipe_than_its_inputs(module):
    """What is not in StageInputs cannot be read by what runs a phase: no recipe reaches it."""
    held = set(typing.get_type_hints(Context).values())
    assert dict[str, StageInputs] in held and Recipe not in held
    tree = ast.parse(Path(module.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert "StageInputs" in imported and "Recipe" not in imported
    assert not {"recipe", "evaluate", "export"} & {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}


def test_a_field_that_is_null_changes_no_key():
    stage = Stage.model_validate({"id": "s", "train": {"epochs": 1, "lr": 1e-3}})
    described = stage.model_dump(mode="json")
    key = given({"stage": described, "target": None})
    assert key == given({"stage": described | {"later": None}, "target": None}) and "target" in key
    assert key != given({"stage": described | {"later": 1}, "target": None})


def test_a_field_that_a_later_version_adds_changes_no_stage_that_does_without_it():
    inputs = inputs_of(recipe({"id": "b", "palettize": {"method": "kmeans"}}))["b"]
    first = [f.name for f in dataclasses.fields(StageInputs) if f.default is dataclasses.MISSING]
    assert list(inputs.key()) == first and len(first) < len(dataclasses.fields(StageInputs))
    other = dataclasses.replace(inputs, asked_once=True)
    assert list(other.key()) == [*first, "asked_once"] and other.digest() != inputs.digest()


@pytest.mark.parametrize("field", dataclasses.fields(StageInputs), ids=lambda field: field.name)
def test_every_input_is_in_the_key(field):
    """Another value of any field is another key, and another stage after it."""
    checked = recipe({"id": "b", "palettize": {"method": "kmeans"}})
    inputs = inputs_of(checked)["a"]
    value = getattr(inputs, field.name)
    others = {"stage": checked.stages[1], "peaks": not inputs.peaks, "threads": 3, "widths": (2,), "after": {"x": "y"}}
    if isinstance(value, BaseModel) and field.name != "stage":
        name, kept = next((n, v) for n, v in value if isinstance(v, str | int) and not isinstance(v, bool))
        other = value.model_copy(update={name: f"{kept}1"})
    else:
        other = others.get(field.name, f"{value}1")
    changed = dataclasses.replace(inputs, **{field.name: other})
    assert changed.key() != inputs.key() and changed.digest() != inputs.digest()
    whole = dataclasses.replace(inputs, asked_once=True)  # at its default it is no part of the key
    assert set(whole.key()) == {f.name for f in dataclasses.fields(StageInputs)}
    assert json.loads(json.dumps(inputs.key())) == inputs.key()


B = {"id": "b", "train": TRAIN}


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (recipe(B), ["a", "b"]),
        (recipe(B, gates={"max_drop": 1}), ["a", "b"]),
        (recipe({"id": "b", "train": {"epochs": 3, "lr": 0.1}}), ["a"]),
        (recipe(B, stages=[{"id": "a", "train": {"epochs": 3, "lr": 0.1}}, B]), []),
        (recipe(B, seed=7), []),
        (recipe(B, data={"train": "u.csv"}), []),
        (recipe(B, precision="bf16-master"), []),
        (recipe({**B, "from": "model"}), ["a"]),
        (recipe({**B, "teacher": "a", "distill": {}}), ["a"]),
        # the same settings, after another stage
        (recipe({"id": "c", "train": TRAIN}, {**B, "from": "a"}), ["a", "b"]),
        (recipe({"id": "c", "train": TRAIN}, {**B, "from": "c"}), ["a"]),
    ],
)
def test_only_stages_with_the_same_past_are_taken(tmp_path, now, expected):
    assert taken(tmp_path, identity(recipe(B)), identity(now)) == expected


@pytest.mark.parametrize(
    "changes", [{"data_hash": "other"}, {"processes": 2}, {"versions": {"torch": "3"}}, {"models": {"model.path": "x"}}]
)
def test_nothing_is_taken_where_the_run_is_another(tmp_path, changes, caplog):
    assert taken(tmp_path, identity(recipe(B)), identity(recipe(B), **changes)) == []
    assert f"{next(iter(changes))} differ" in caplog.text


def test_what_differs_is_said(tmp_path, caplog):
    assert taken(tmp_path, identity(recipe(B)), identity(recipe(B, seed=7))) == []
    assert "seed was 42 and is 7" in caplog.text


def test_a_run_that_did_not_write_its_inputs_is_not_reused(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    old = {key: value for key, value in identity(recipe(B)).items() if key != "format"}
    assert taken(tmp_path, old, identity(recipe(B))) == []
    assert "another version of mptrain made it" in caplog.text


def test_an_input_that_an_older_version_did_not_have_and_that_is_null_keeps_a_stage(tmp_path):
    old = identity(recipe(B))
    nulls = [name for name, value in old["stages"]["b"].items() if value is None]
    assert nulls  # a field of StageInputs that has come since is such a one
    for stage in old["stages"].values():
        for name in nulls:
            stage.pop(name, None)
    assert taken(tmp_path, old, identity(recipe(B))) == ["a", "b"]


LATENCY = {"id": "b", "prune": FISHER | {"keep": {"latency": 0.5}}}
PLAIN = {"id": "b", "prune": FISHER | {"keep": {"macs": 0.5}}, "palettize": {"method": "kmeans"}}
BUDGET = {"id": "b", "palettize": {"method": "kmeans", "size_budget": 3.0}}


@pytest.mark.parametrize(
    ("stage", "before", "now", "expected"),
    [
        (LATENCY, {"evaluate": evaluate(1, 2)}, {"evaluate": evaluate(2, 1)}, ["a"]),
        (LATENCY, {"evaluate": evaluate(1, 2)}, {"evaluate": evaluate(1, runs=9)}, ["a", "b"]),
        (PLAIN, {"evaluate": evaluate(1, 2)}, {"evaluate": evaluate(2, 1)}, ["a", "b"]),
        (PLAIN, {}, {"export": [openvino("fp32", "fp16")]}, []),  # stage a trains, and keeps what an fp16 export needs
        (PLAIN, {"export": [openvino("fp16")]}, {}, []),
        (PLAIN, {"export": [openvino("fp16")]}, {"export": [openvino("fp32", "fp16")]}, ["a", "b"]),
        (PLAIN, {}, {"export": [openvino("fp32"), core_ml("iOS16")]}, ["a", "b"]),
        (BUDGET, {"export": [core_ml("iOS18")]}, {"export": [core_ml("iOS16")]}, ["a"]),
        (BUDGET, {"export": [core_ml("iOS17")]}, {"export": [openvino("fp32")]}, ["a"]),
        (BUDGET, {"export": [core_ml("iOS18")]}, {"export": [openvino("fp32")]}, ["a", "b"]),
        (BUDGET, {"export": [core_ml("iOS17")]}, {"export": [core_ml("iOS16")]}, ["a", "b"]),
        (BUDGET, {"export": [core_ml("iOS18", of="a")]}, {"export": [core_ml("iOS16", of="a")]}, ["a", "b"]),
    ],
)
def test_a_stage_is_taken_when_what_it_reads_of_evaluate_and_export_is_the_same(tmp_path, stage, before, now, expected):
    assert taken(tmp_path, identity(recipe(stage, **before)), identity(recipe(stage, **now))) == expected
