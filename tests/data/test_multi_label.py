"""Several labels to a text: scores against scikit-learn, columns as people have them, errors that name the row."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from kit.tiny import tokenizer
from sklearn.metrics import average_precision_score, f1_score, log_loss

from mptrain.core.errors import DataError
from mptrain.data.load import load_data
from mptrain.data.tasks.multi_label import MultiLabel, _mean_average_precision, _scores
from mptrain.recipe import Data

NAMES = ["blame", "person", "praise"]


def loaded(folder, rows, **data):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_data(
        Data(train=str(file), max_length=12, max_unknown=1.0, **data), "multi-label-classification", tokenizer(), seed=1
    )


def rows(write=lambda names: names, n=60):
    chosen = [[name for bit, name in enumerate(NAMES) if (i % 7 + 1) >> bit & 1] for i in range(n)]
    return [{"text": f"good film {i}", "label": write(names)} for i, names in enumerate(chosen)]


@pytest.fixture(scope="module")
def drawn():
    draw = np.random.default_rng(0)
    targets = (draw.random((200, 5)) < [0.5, 0.2, 0.05, 0.3, 0.1]).astype(np.float64)
    return np.round(draw.normal(size=targets.shape) + targets, 1), targets  # rounded: with ties


def test_scores_are_those_of_scikit_learn(drawn):
    logits, targets = drawn
    micro, macro, precision, loss = _scores(logits, targets)
    assert micro.value == pytest.approx(f1_score(targets, logits > 0, average="micro"))
    assert macro.value == pytest.approx(f1_score(targets, logits > 0, average="macro"))
    assert precision.value == pytest.approx(average_precision_score(targets, logits, average="macro"))
    probabilities = 1 / (1 + np.exp(-logits))
    each = [log_loss(targets[:, i], probabilities[:, i], labels=[0, 1]) for i in range(5)]
    assert loss.value == pytest.approx(np.mean(each))


def test_a_label_that_is_not_there_is_left_out_of_the_means(drawn):
    logits, targets = drawn
    targets = targets * [1, 1, 0, 1, 1]
    kept = [0, 1, 3, 4]
    _, macro, precision, _ = _scores(logits, targets)
    assert precision.value == pytest.approx(average_precision_score(targets[:, kept], logits[:, kept], average="macro"))
    logits = np.where([0, 0, 1, 0, 0], -1.0, logits)
    _, macro, _, _ = _scores(logits, targets)
    assert macro.value == pytest.approx(f1_score(targets[:, kept], logits[:, kept] > 0, average="macro"))
    assert np.isnan(_mean_average_precision(np.concatenate([logits, np.zeros_like(logits)], axis=1)))


@pytest.mark.parametrize("write", ["|".join, "; ".join, ", ".join, json.dumps, repr])
def test_labels_are_read_as_people_write_them(write, tmp_path):
    expected = loaded(tmp_path, rows())
    found = loaded(tmp_path, rows(write))
    assert (found.labels, found.hash) == (expected.labels, expected.hash) == (NAMES, expected.hash)
    batch = found.collate([found.train[i] for i in range(4)])
    assert batch["labels"].dtype == torch.float32 and batch["labels"].shape == (4, 3)
    assert found.facts["labels"]["train"].keys() == set(NAMES)


def test_a_column_to_each_label(tmp_path):
    expected = loaded(tmp_path, rows())
    for yes, no in ((1, 0), ("1", "0"), (1.0, 0.0), (True, False)):
        given = [{"text": r["text"], **{n: yes if n in r["label"] else no for n in NAMES}} for r in rows()]
        found = loaded(tmp_path, given, labels=NAMES)
        assert (found.labels, found.hash) == (NAMES, expected.hash)
    given[4]["praise"] = 0.3
    with pytest.raises(DataError, match=r"row 5 of .* holds 0.3 in the column 'praise', where 0 or 1 is needed"):
        loaded(tmp_path, given, labels=NAMES)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ([], "row 9 of .* has no label. Give it one or drop the row"),
        ("", "row 9 of .* has no label"),
        (["praise", ""], "a label is empty"),
        (None, "holds None where labels are needed"),
        (3.5, "holds 3.5 where labels are needed"),
        ([{"a": 1}], "where labels are needed"),
        ("[praise", "has the label"),
    ],
)
def test_a_cell_without_labels_is_named_by_its_row(cell, message, tmp_path):
    given = rows()
    given[8]["label"] = cell
    labels = {"labels": NAMES} if "has the label" in message else {}
    with pytest.raises(DataError, match=message):
        loaded(tmp_path, given, **labels)


def test_rows_without_labels_are_allowed_where_the_labels_are_named(tmp_path):
    given = rows()
    given[8]["label"] = []
    assert loaded(tmp_path, given, labels=NAMES).labels == NAMES


def test_a_label_that_only_test_has_counts_as_missed(tmp_path, caplog):
    test = tmp_path / "test.jsonl"
    given = [{"text": f"film {i}", "label": ["praise", "rare"]} for i in range(10)]
    test.write_text("".join(json.dumps(row) + "\n" for row in given))
    with caplog.at_level(logging.WARNING):
        data = loaded(tmp_path, rows(), test=str(test))
    assert "lacks 1 of the labels of the others (first: 'rare')" in caplog.text
    sure = torch.tensor([-30.0, -30.0, 30.0])
    micro, macro, _, loss = data.evaluate(lambda b: {"logits": sure.expand(len(b["input_ids"]), 3)}, "test")
    assert micro.value == pytest.approx(2 / 3) and macro.value == pytest.approx(1 / 2)
    assert loss.value == pytest.approx(0.0, abs=1e-6)
    assert data.train[0]["labels"].shape == (3,)


def test_a_label_of_data_labels_that_no_training_row_has_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no row of .* has the label 'rare', so it cannot be learned"):
        loaded(tmp_path, rows(), labels=[*NAMES, "rare"])


def test_one_label_is_another_task(tmp_path):
    with pytest.raises(DataError, match=r"there is one label, .* the task is text-classification"):
        loaded(tmp_path, [row | {"label": "praise"} for row in rows()])


def test_agreement_is_the_overlap_of_what_is_predicted():
    ours = {"logits": torch.tensor([[1.0, 1.0, -1.0], [-1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]])}
    theirs = {"logits": torch.tensor([[1.0, -1.0, 1.0], [-1.0, -1.0, -1.0], [1.0, -1.0, -1.0]])}
    np.testing.assert_allclose(MultiLabel.agreement(ours, theirs, {}), [1 / 3, 1, 0])


def test_distillation_is_the_divergence_of_each_label(tmp_path):
    data = loaded(tmp_path, rows())
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 3, generator=draw).double() for _ in range(2))
    found = data.distillation({"logits": student}, {"logits": teacher}, {}, 3.0)
    p, q = ((x / 3).sigmoid() for x in (teacher, student))
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean() * 9
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
