"""Arms of what teaches a small model: valid recipes, as many steps for all, and a mean over seeds that is paired."""

from __future__ import annotations

import json

import pytest

from benchmarks.jpqd import distil
from mptrain.recipe import Recipe

ROWS = {"train": 8912, "few": 2228, "others": 6684}


@pytest.mark.parametrize("arm", distil.ARMS)
def test_every_arm_sees_as_many_reviews(arm, tmp_path):
    (tmp_path / "dense").mkdir()
    described = distil.recipe(arm, 0, tmp_path / "dense", tmp_path / "small", tmp_path, tmp_path / "run")
    found = Recipe.model_validate(described)
    (stage,) = found.stages
    rows = ROWS[found.data.train.rpartition("/")[2].removesuffix(".csv")]
    rows += ROWS["others"] if found.data.unlabelled else 0
    assert rows * stage.train.epochs == ROWS["train"]
    assert (stage.distill is None) == (arm == "labels")


def test_an_arm_counts_when_all_seeds_are_there():
    run = {"correct": "1101", "validation": 0.8, "steps": 3}
    arms = {"pruned": {"correct": "1000"}, **{f"{distil.BASE}/{seed}": run for seed in distil.SEEDS}}
    arms["labels/0"] = run | {"correct": "1001"}
    assert [row["name"] for row in distil.summary(arms)] == [distil.BASE]
    arms["labels/1"] = run
    rows = {row["name"]: row for row in distil.summary(arms)}
    assert rows["labels"]["ahead"][0] == pytest.approx(-0.125) and rows[distil.BASE]["ahead"][0] == 0
    assert json.dumps(list(rows.values()))


def test_inputs_without_labels_are_compared_with_the_few_that_have_them():
    few = {"correct": "1100", "validation": 0.8, "steps": 3}
    arms = {f"few/alone/{seed}": few for seed in distil.SEEDS}
    arms |= {f"few/unlabelled/{seed}": few | {"correct": "1101"} for seed in distil.SEEDS}
    (row,) = distil.summary(arms)  # nothing is compared with BASE, which has not been run
    assert (row["name"], row["of"]) == ("few/unlabelled", "few/alone") and row["ahead"][0] == pytest.approx(0.25)
