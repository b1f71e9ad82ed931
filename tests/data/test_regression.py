"""Regression: scores against scipy and scikit-learn, numbers as people write them, errors that name the row."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from kit.tiny import tokenizer
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import mean_absolute_error, mean_squared_error
from transformers import BertConfig

from mptrain.core.errors import DataError
from mptrain.data.load import load_data
from mptrain.data.tasks.numbers import correlations
from mptrain.data.tasks.regression import Regression
from mptrain.measure.intervals import interval, paired_difference
from mptrain.models.samples import guess_task
from mptrain.recipe import Data

WORDS = ["good", "bad", "film", "plot"]


def loaded(folder, rows, **data):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_data(Data(train=str(file), max_length=12, max_unknown=1.0, **data), "regression", tokenizer(), seed=1)


def rows(n=60):
    return [{"text": f"{WORDS[i % 4]} {WORDS[i // 4 % 4]} {i}", "label": (i % 4 - i // 4 % 4) / 2} for i in range(n)]


def test_scores_are_those_of_scipy_and_scikit_learn(tmp_path):
    data = loaded(tmp_path, rows())
    values = data._targets["test"]
    draw = np.random.default_rng(0)
    given = iter(values + draw.normal(0, 0.7, len(values)))
    order = sorted(range(len(values)), key=lambda i: -data.test.lengths[i])
    predictions = np.zeros(len(values))

    def forward(batch):
        found = torch.tensor([[next(given)] for _ in batch["input_ids"]])
        start = int((predictions != 0).sum())
        predictions[order[start : start + len(found)]] = found[:, 0].float()
        return {"logits": found}

    mae, mse, pearson, spearman = data.evaluate(forward, "test", 4)
    assert mae.value == pytest.approx(mean_absolute_error(values, predictions))
    assert mse.value == pytest.approx(mean_squared_error(values, predictions))
    assert pearson.value == pytest.approx(pearsonr(values, predictions).statistic)
    assert spearman.value == pytest.approx(spearmanr(values, predictions).statistic)
    assert [s.higher_is_better for s in (mae, mse, pearson, spearman)] == [False, False, True, True]


def test_correlations_keep_their_digits_far_from_zero_and_none_of_a_constant():
    draw = np.random.default_rng(1)
    y = 1e6 + draw.normal(0, 1, 300)
    p = y + draw.normal(0, 1, 300)
    found = correlations(p, y)
    assert found["pearson"].value == pytest.approx(pearsonr(p, y).statistic, abs=1e-6)
    assert np.isnan(correlations(np.full(300, 2.0), y)["pearson"].value)
    assert np.isnan(correlations(np.full(300, 2.0), y)["spearman"].value)


@pytest.mark.long
def test_intervals_of_a_rank_correlation_cover_the_truth():
    """Spearman's of normals with correlation r is 6/pi asin(r/2) (Kendall and Gibbons)."""
    r, covered, draw = 0.6, 0, np.random.default_rng(2)
    truth = 6 / np.pi * np.arcsin(r / 2)
    for _ in range(60):
        y, e = draw.normal(size=(2, 150))
        score = correlations(r * y + np.sqrt(1 - r * r) * e, y)["spearman"]
        low, high = interval(score)
        covered += low <= truth <= high
    assert 52 <= covered <= 60, "95% of 60 are 57"


def test_differences_of_rank_correlations_are_paired():
    y, e, f = np.random.default_rng(2).normal(size=(3, 400))
    good, like, worse = (correlations(y + noise, y)["spearman"] for noise in (0.5 * e, 0.5 * e + 0.02 * f, e + f))
    assert paired_difference(like, good).verdict(True) == "tied"
    found = paired_difference(worse, good)
    assert found.verdict(True) == "worse" and found.value == pytest.approx(worse.value - good.value)
    apart = interval(like)[1] - interval(like)[0]
    tied = paired_difference(like, good)
    assert tied.high - tied.low < apart / 4, "both sides resample the same rows"


def test_numbers_are_read_from_text_and_their_spread_is_a_fact(tmp_path):
    given = [row | {"label": str(row["label"])} for row in rows()]
    assert loaded(tmp_path, given).hash == loaded(tmp_path, rows()).hash
    facts = loaded(tmp_path, rows()).facts["values"]["train"]
    assert (facts["min"], facts["max"]) == (-1.5, 1.5)


@pytest.mark.parametrize("cell", [None, "", "high", "1,5", True, float("nan"), float("inf"), [1.0]])
def test_a_cell_that_is_no_number_is_named_by_its_row(cell, tmp_path):
    given = rows()
    given[16]["label"] = cell
    with pytest.raises(DataError, match=r"data.label: row 17 of data.train \(.*rows.jsonl\) holds .* number is needed"):
        loaded(tmp_path, given)


def test_a_column_of_one_value_teaches_nothing(tmp_path):
    with pytest.raises(DataError, match="every row has the value 2, so there is nothing to learn"):
        loaded(tmp_path, [row | {"label": 2} for row in rows()])


def test_values_of_another_scale_are_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        loaded(tmp_path, [row | {"label": 1000 * row["label"]} for row in rows()])
    assert "values have mean" in caplog.text and "scaled to a few units" in caplog.text


def test_agreement_is_relative_to_the_spread_of_a_batch():
    """By the argmax of one output any two models agreed."""
    ours = {"logits": torch.tensor([[0.0], [10.0], [20.0]])}
    std = np.std([0, 10, 20])
    off = {"logits": np.array([[0.0], [10.0 + std / 4], [50.0]], np.float32)}
    np.testing.assert_allclose(Regression.agreement(ours, off, {}), [1.0, 0.75, 0.0], atol=1e-6)


def test_the_head_of_a_model_says_that_it_is_for_numbers():
    for config in ({"num_labels": 1}, {"problem_type": "regression"}):
        assert guess_task(BertConfig(architectures=["BertForSequenceClassification"], **config)) == "regression"
    several = BertConfig(architectures=["BertForSequenceClassification"], problem_type="multi_label_classification")
    assert guess_task(several) == "multi-label-classification"
    assert guess_task(BertConfig(architectures=["BertForSequenceClassification"])) == "text-classification"
