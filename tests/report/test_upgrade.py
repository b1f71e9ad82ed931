"""Reports of other times and tasks: a report of old reads as one of now, one of an unknown task renders."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
from kit import report_sample as sample

from mptrain.data.tasks.metrics import Measure, Score
from mptrain.recipe import TASKS
from mptrain.report.render.card import card
from mptrain.report.render.files import read
from mptrain.report.render.markdown import markdown
from mptrain.report.render.page import page

AUC = Measure("auc", lambda rows: float((rows[rows[:, 1] == 1, :1] > rows[rows[:, 1] == 0, 0]).mean()), whole=True)


def of_old(report):
    """As it was written before scores and tasks described themselves."""
    report = copy.deepcopy(report)
    del report["about_task"], report["metric"]["unit"]
    for row in report["variants"]:
        row["parity"]["argmax_agreement"] = row["parity"].pop("agreement")
        for scores in (row["metrics"], *row["multiple_choice"].values()):
            for measured in scores.values():
                del measured["unit"]
    for row in report["comparisons"]:
        del row["unit"]
    for measured in report["floor"]["metrics"].values():
        del measured["unit"]
    return report


def test_a_report_of_old_is_read_as_one_of_now(tmp_path):
    report = sample.report()
    (tmp_path / "report.json").write_text(json.dumps(of_old(report)))
    found = read(tmp_path)
    assert found == json.loads(json.dumps(report))
    assert (markdown(found), page(found), card(found)) == (markdown(report), page(report), card(report))


def test_a_task_that_is_not_known_here_renders_from_what_its_report_says(tmp_path, monkeypatch):
    spec = replace(TASKS["text-classification"], name="clicks", tag="tabular-classification", floor="popularity")
    spec = replace(spec, unit=None, processor=None, optimum=None, pipeline=None, cuts=False)
    monkeypatch.setitem(TASKS, "clicks", spec)
    draw = np.random.default_rng(0)
    clicked = (draw.random(400) < 0.4).astype(float)

    def auc(noise):
        return Score("auc", np.stack([clicked + noise * draw.normal(size=400), clicked], 1), AUC, "coefficient")

    made = sample.variants()
    variants = [replace(v, scores=[auc(0.5 + 0.2 * i)]) for i, v in enumerate(made)]
    recipe = sample.recipe(model={"path": "packaged:x", "task": "clicks"}, gates={"max_drop": 0.03})
    report = sample.report(recipe=recipe, variants=variants, floor=auc(3.0))
    (tmp_path / "report.json").write_text(json.dumps(report))
    monkeypatch.delitem(TASKS, "clicks")
    found = read(tmp_path)
    text = markdown(found)
    value = report["variants"][0]["metrics"]["auc"]["value"]
    assert "AUC" in text and f"{value:.4f}" in text and f"{100 * value:.2f}%" not in text
    assert "popularity" in text and "max_drop" in text and "0.0300" in text
    shown = card(found)
    assert "pipeline_tag: tabular-classification" in shown and "compile_model" in shown and "pipeline(" not in shown
    assert "AUC" in page(found)


def test_a_method_that_is_not_known_here_is_named_as_the_recipe_did(tmp_path):
    """Of a version that did not write words yet, or that had another method."""
    report = json.loads(json.dumps(sample.report()))
    words = report["methods"]["jpqd"]["words"]
    del report["methods"]
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert read(tmp_path)["methods"]["jpqd"]["words"] == words, "one that is known says it itself"
    report["recipe"]["stages"][1]["quantize"] = {"mode": "octal", "digits": 3}
    report["variants"][1]["format"] = report["variants"][1]["precision"] = "octets"
    (tmp_path / "report.json").write_text(json.dumps(report))
    found = read(tmp_path)
    assert found["methods"]["jpqd"]["words"] == ["prune fisher", "quantize octal"]
    assert "quantize octal" in markdown(found) and "quantize octal" in card(found) and page(found)


def test_a_drop_is_relative_for_a_number_and_a_difference_for_a_coefficient():
    def drops(unit, higher, values):
        scores = [
            Score("m", np.full((50, 1), value), Measure("mean", lambda m: m[0]), unit, higher) for value in values
        ]
        variants = [replace(v, scores=[s]) for v, s in zip(sample.variants(), scores)]
        report = sample.report(variants=variants, floor=None, recipe=sample.recipe(gates={"max_drop": 0.05}))
        return [c["drop"] for c in report["comparisons"]]

    np.testing.assert_allclose(drops("coefficient", True, [0.8, 0.79, 0.6]), [0.01, 0.2])
    np.testing.assert_allclose(drops("number", False, [2.0, 2.2, 1.0]), [0.1, -0.5])
    np.testing.assert_allclose(drops("number", True, [20.0, 19.0, 30.0]), [0.05, -0.5])
    np.testing.assert_allclose(drops("number", False, [-2.0, -1.5, -2.0]), [0.25, 0.0])
