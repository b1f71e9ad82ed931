"""Clicks: what a cell may say, log loss and AUC against scikit-learn, and what cannot be learnt."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch
from kit.tiny import tokenizer
from sklearn.metrics import log_loss, roc_auc_score

from mptrain.core.errors import DataError
from mptrain.data.load import load_data
from mptrain.data.tasks.click_rate import ClickRate, _scores
from mptrain.measure.intervals import interval, paired_difference
from mptrain.recipe import Data


def load(tmp_path, cells, **data):
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["text", "label"], *((f"good film {i}", cell) for i, cell in enumerate(cells))])
    return load_data(
        Data(train=str(tmp_path / "a.csv"), max_length=32, max_unknown=1.0, **data), "click-rate", tokenizer(), seed=0
    )


@pytest.mark.parametrize("ties", [False, True])
def test_scores_are_those_of_scikit_learn(ties):
    draw = np.random.default_rng(0)
    clicks = (draw.random(400) < 0.3).astype(float)
    logits = draw.standard_normal(400) + clicks
    logits = np.round(logits) if ties else logits
    loss, auc = _scores(logits, clicks)
    assert loss.value == pytest.approx(log_loss(clicks, 1 / (1 + np.exp(-logits))))
    assert auc.value == pytest.approx(roc_auc_score(clicks, logits))
    low, high = interval(auc)
    assert low < auc.value < high and auc.unit == "coefficient" and not loss.higher_is_better
    worse = paired_difference(_scores(draw.standard_normal(400), clicks)[1], auc)
    assert worse.high < 0


def test_of_one_class_there_is_no_auc_and_certain_errors_are_finite():
    loss, auc = _scores(np.array([500.0, -500.0]), np.zeros(2))
    assert math.isnan(auc.value) and loss.value == pytest.approx(250)


def test_clicks_as_people_write_them(tmp_path):
    data = load(tmp_path, ["1", "0", "true", "False", "1.0", "0.0"] * 10)
    assert {float(data.train[i]["labels"]) for i in range(len(data.train))} == {0.0, 1.0}
    assert 0.3 < data.facts["click_rate"]["train"] < 0.7 and data.labels == ["label"]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["1", "0", "2"] * 10, "row 6 of .* holds '2' where a click is needed"),
        (["1", "0", ""] * 10, "row 6 of .* holds '' where a click"),
        (["1", "0", "nan"] * 10, "row 6 of .* holds 'nan'"),
        (["0"] * 30, "nothing was clicked"),
        (["1"] * 30, "everything was clicked"),
    ],
)
def test_what_is_no_click_is_named_with_its_row(tmp_path, cells, message):
    with pytest.raises(DataError, match=message):
        load(tmp_path, cells)


@pytest.mark.parametrize("history", ["", "  "])
def test_a_row_without_a_history_is_named(tmp_path, history):
    rows = [[f"good film {row}", history if row == 7 else "a film", row % 2] for row in range(30)]
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["item", "history", "label"], *rows])
    spec = Data(train=str(tmp_path / "a.csv"), text="item", text_pair="history", max_length=32)
    with pytest.raises(DataError, match=r"text_pair.* row 8 of .*a\.csv.* holds .* told from nothing"):
        load_data(spec, "click-rate", tokenizer(), seed=0)


def test_distillation_is_least_at_the_teacher(tmp_path):
    task = load(tmp_path, ["1", "0"] * 20)
    teacher, student = {"logits": torch.tensor([[0.5], [-2.0]])}, torch.tensor([[0.0], [0.0]], requires_grad=True)
    assert float(task.distillation(teacher, teacher, {}, 2.0)) == pytest.approx(0, abs=1e-7)
    task.distillation({"logits": student}, teacher, {}, 2.0).backward()
    assert student.grad[0] < 0 < student.grad[1]


def test_two_models_agree_as_far_as_they_rank_alike():
    one = {"logits": np.array([[0.1], [0.5], [2.0]])}
    assert ClickRate.agreement(one, {"logits": 3 * one["logits"]}, {}).mean() == 1
    assert ClickRate.agreement(one, {"logits": -one["logits"]}, {}).mean() == 0
