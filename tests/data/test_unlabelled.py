"""Inputs without targets: read, kept apart from what scores, passed over by the loss."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from kit import tiny

from mptrain.core.errors import DataError, MptrainError
from mptrain.data.load import load_data
from mptrain.data.tasks.base import IGNORED
from mptrain.models.load import load_model
from mptrain.models.processor import load_processor
from mptrain.recipe.file import read
from mptrain.run import run


def texts(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in rows)])
    return str(path)


@pytest.fixture(name="described")
def _described(tmp_path):
    found = tiny.jpqd(tmp_path)
    found["data"]["unlabelled"] = texts(tmp_path / "more.csv", [f"good bad film {'the ' * n}" for n in range(9)])
    return found


def loaded(described, path):
    recipe = read(str(tiny.write(described, path))).recipe
    return recipe, load_data(recipe.data, recipe.model.task, load_processor(recipe.model), seed=0)


def test_what_is_in_a_split_is_left_out_and_the_rest_stands_behind_train(described, tmp_path):
    _, data = loaded(described, tmp_path / "a.yaml")
    with open(described["data"]["train"], newline="") as file:
        own = list(csv.DictReader(file))
    described["data"]["unlabelled"] = texts(tmp_path / "more.csv", [own[0]["text"], "film " * 30, own[-1]["text"]])
    _, again = loaded(described, tmp_path / "a.yaml")
    assert again.facts["unlabelled"] == {"examples": 1, "in_a_split": 2}
    assert data.facts["unlabelled"] == {"examples": 9, "in_a_split": 0}
    assert len({data.hash, again.hash}) == 2
    assert data.taught(distilled=False) is data.train and len(data.train) == len(again.train)
    whole = data.taught(distilled=True)
    assert len(whole) == len(data.train) + 9 and whole.lengths[: len(data.train)] == data.train.lengths
    assert [whole[i]["labels"] for i in range(len(data.train), len(whole))] == [IGNORED] * 9
    assert whole[0] == data.train[0]
    described["data"]["unlabelled"] = texts(tmp_path / "more.csv", [own[0]["text"]])
    with pytest.raises(DataError, match=r"data\.unlabelled: all 1 inputs of .* are in a split"):
        loaded(described, tmp_path / "a.yaml")


def test_the_loss_of_a_batch_is_that_of_its_labelled_rows_over_all_rows(described, tmp_path):
    recipe, data = loaded(described, tmp_path / "a.yaml")
    whole = data.taught(distilled=True)
    batch = data.collate([whole[0], whole[1], whole[len(whole) - 1], whole[len(whole) - 2]])
    assert data.labelled_share(batch) == 0.5
    model = load_model(recipe.model, data.labels, seed=0).eval()
    logits = model(**data.without_targets(batch)).logits
    wanted = torch.nn.functional.cross_entropy(logits[:2], batch["labels"][:2])
    torch.testing.assert_close(model(**batch).loss, wanted)


def test_refused_where_nothing_learns_from_it_or_the_task_has_no_such_loss(described, tmp_path):
    alone = json.loads(json.dumps(described))
    for stage in alone["stages"]:
        stage.pop("distill", None)
        stage.pop("teacher", None)
    with pytest.raises(MptrainError, match=r"data\.unlabelled: no stage has distill"):
        read(str(tiny.write(alone, tmp_path / "b.yaml")))
    described["model"]["task"] = "token-classification"
    with pytest.raises(DataError, match=r"data\.unlabelled: the task token-classification does not use it"):
        loaded(described, tmp_path / "b.yaml")


def test_a_stage_with_a_teacher_trains_on_them_and_the_report_says_so(described, tmp_path):
    described["data"]["unlabelled"] = texts(
        tmp_path / "more.csv", [f"good {'film ' * (n % 20)}{n}" for n in range(120)]
    )
    described["data"]["max_unknown"] = 0.5
    described["stages"][1] = {
        "id": "small",
        "teacher": "dense",
        "train": {"epochs": 1, "lr": 1e-3, "batch_size": 4, "log_steps": 1},
        "distill": {"weight": 0.5},
    }
    described["stages"][0]["train"]["epochs"] = 1
    described["export"] = [{"id": "ov", "format": "openvino", "of": ["dense", "small"], "precision": ["fp32"]}]
    described["gates"] = {"fused_attention": None, "max_drop": None}
    report = run(read(str(tiny.write(described, tmp_path / "a.yaml"))).recipe)
    counts = report["data"]["examples"]["train"], report["data"]["unlabelled"]["examples"]
    assert counts[1] == 120 and report["data"]["unlabelled"]["in_a_split"] == 0
    losses = [row for row in report["history"] if row["stage"] == "small" and "loss" in row]
    assert len(losses) == sum(counts) // 4
    none = [row for row in losses if row["task_loss"] == 0.0]
    assert 0 < len(none) < len(losses) and all(row["distill_loss"] > 0 and row["loss"] > 0 for row in none)
