"""The page of results says with what a run was made, where that is not what the recipe has now."""

from __future__ import annotations

import copy

from mptrain.recipe import file
from scripts.results import runs


def report(**quantize):
    recipe = file.read("jpqd-bert", []).recipe.model_dump(mode="json")
    recipe["stages"][-1]["quantize"] |= quantize
    return {"name": "jpqd-bert", "recipe": recipe}


def test_settings_that_the_recipe_does_not_have_are_said():
    assert runs.otherwise(report()) == []
    assert runs.otherwise(report(start="joint", reduce_range=True)) == [
        "`stages.jpqd.quantize.reduce_range: true`",
        "`stages.jpqd.quantize.start: joint`",
    ]
    assert runs.otherwise(report(gone=1)) == [], "a setting that is no more"


def test_settings_that_say_nothing_there_are_not():
    without = copy.deepcopy(report(start="joint"))
    without["recipe"]["stages"][-1]["prune"] = None
    assert runs.otherwise(without) == []
    assert runs.otherwise(report(start="joint") | {"name": "a recipe of my own"}) == []
