"""`train.report_to`: what a tracker gets of a run is what the report has of it."""

from __future__ import annotations

import json

import pytest
from kit import tiny
from kit.jobs import differences, metrics, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from mptrain.recipe.data import TRACKERS


def described(folder):
    recipe = tiny.jpqd(folder)
    recipe["stages"] = recipe["stages"][:1]
    recipe["stages"][0]["train"] |= {"epochs": 2, "log_steps": 3}
    recipe["export"][0] |= {"of": ["dense"], "precision": ["fp32"]}
    return recipe


@pytest.mark.long
def test_tensorboard_has_the_losses_of_the_report(tmp_path):
    recipe = described(tmp_path)
    run(tiny.write(recipe, tmp_path / "plain.yaml"))
    plain = metrics(tmp_path / "run")
    recipe["stages"][0]["train"]["report_to"] = ["tensorboard"]
    recipe["output"]["dir"] = str(tmp_path / "tracked")
    # another tracker is no other stage
    said = run(tiny.write(recipe, tmp_path / "tracked.yaml"), "--reuse", str(tmp_path / "run")).stderr
    assert "dense" in said and not list((tmp_path / "tracked").rglob("events.out.tfevents.*"))
    run(tmp_path / "tracked.yaml", "--fresh")
    assert not differences(metrics(tmp_path / "tracked"), plain)
    (file,) = (tmp_path / "tracked" / "stages" / "dense" / "0-train").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent)).Reload()
    history = json.loads((tmp_path / "tracked" / "report.json").read_text())["history"]
    losses = {row["step"]: row["loss"] for row in history if "loss" in row}
    assert {e.step: e.value for e in events.Scalars("train/loss")} == pytest.approx(losses, rel=1e-6)
    accuracy = {row["step"]: row["eval/accuracy"] for row in history if "eval/accuracy" in row}
    assert {e.step: e.value for e in events.Scalars("eval/accuracy")} == pytest.approx(accuracy)


def test_trackers_are_those_of_transformers():
    assert set(TRACKERS) <= set(INTEGRATION_TO_CALLBACK)
