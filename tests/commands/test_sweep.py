"""Sweeps: the grid, what points share, and the command as a user runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from kit import tiny
from kit.jobs import run

from mptrain.commands.sweep import points
from mptrain.core.errors import RecipeError

KEEP = "stages.jpqd.prune.keep.encoder_params"


@pytest.fixture
def recipe(tmp_path):
    return tiny.write(tiny.jpqd(tmp_path), tmp_path / "tiny.yaml")


def test_a_grid_is_every_combination(recipe, tmp_path):
    grid = points(str(recipe), ["seed=7"], [f"{KEEP}=0.6,0.5", "stages.jpqd.train.lr=[1e-3, 2e-3]"])
    assert [tuple(p.values.values()) for p in grid] == [
        ("0.6", "1e-3"), ("0.6", "2e-3"), ("0.5", "1e-3"), ("0.5", "2e-3"),
    ]  # fmt: skip
    assert {p.recipe.seed for p in grid} == {7}
    assert grid[1].recipe.stage("jpqd").prune.keep.encoder_params == 0.6
    assert grid[1].recipe.stage("jpqd").train.lr == 2e-3
    folders = [p.recipe.output.dir for p in grid]
    assert folders[1] == f"{tmp_path / 'run'}-sweep/encoder_params-0.6_lr-2e-3" and len(set(folders)) == 4


def test_keys_that_end_alike_are_told_apart(recipe):
    (point,) = points(str(recipe), [], ["stages.dense.train.lr=1e-3", "stages.jpqd.train.lr=1e-4"])
    assert point.recipe.output.dir.endswith("stages.dense.train.lr-1e-3_stages.jpqd.train.lr-1e-4")


def test_values_with_one_slug_get_folders_of_their_own(recipe):
    def names(axis):
        return {p.values["model.path"]: Path(p.recipe.output.dir).name for p in points(str(recipe), [], [axis])}

    found = names("model.path=./A,./a,other")
    assert len(set(found.values())) == 3 and found["other"] == "path-other"
    assert re.fullmatch(r"path-\.-a-[0-9a-f]{8}", found["./a"])
    assert names("model.path=./a,./A") == {key: found[key] for key in ("./a", "./A")}


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (["seed"], "KEY=V1,V2"),
        (["seed="], "KEY=V1,V2"),
        (["seed=1,1"], "1 is given twice"),
        (["seed=1", "seed=2"], "seed is given twice"),
        ([f"seed={','.join(map(str, range(201)))}"], "201 points"),
        ([f"{KEEP}=0.5,2"], "encoder_params"),
        (["stages.jpdq.train.lr=1,2"], "Did you mean 'jpqd'"),
        (["export.ov.precision.0=fp16,int8"], "stage dense has none of"),
    ],
)
def test_a_wrong_grid_is_an_error_before_any_run(recipe, tmp_path, axes, expected):
    with pytest.raises(RecipeError, match=expected):
        points(str(recipe), [], axes)
    assert not list(tmp_path.glob("run*"))


@pytest.mark.long
def test_a_sweep_runs_every_point_once_and_trains_the_shared_stage_once(recipe, tmp_path):
    axis = f"{KEEP}=0.7,0.5"
    assert "encoder_params-0.5" in run(recipe, "--sweep", axis, "--dry-run").stdout
    first = run(recipe, "--sweep", axis)
    assert first.stderr.count("stage dense is the one of") == 1 and "jpqd_int8" in first.stdout
    top = tmp_path / "run-sweep"
    found = json.loads((top / "sweep.json").read_text())["points"]
    assert [p["values"] for p in found] == [{KEEP: "0.7"}, {KEEP: "0.5"}]
    reports = [json.loads((top / p["folder"] / "report.json").read_text()) for p in found]
    baselines, pruned = ([r["variants"][i] for r in reports] for i in (0, 1))
    assert baselines[0]["metrics"] == baselines[1]["metrics"]
    assert pruned[0]["params"] > pruned[1]["params"]
    assert [p["variants"][1]["params"] for p in found] == [v["params"] for v in pruned]

    alone = yaml.safe_load(recipe.read_text())
    alone["output"]["dir"] = str(tmp_path / "alone")
    alone["stages"][1]["prune"]["keep"]["encoder_params"] = 0.5
    run(tiny.write(alone, tmp_path / "alone.yaml"))
    single = json.loads((tmp_path / "alone" / "report.json").read_text())
    assert [v["metrics"] for v in single["variants"]] == [v["metrics"] for v in reports[1]["variants"]]
    again = run(recipe, "--sweep", axis)
    assert again.stderr.count("is finished") == 2
