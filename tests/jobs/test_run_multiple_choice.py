"""A causal LM run with a multiple-choice task: every format scores it, reports show it, a resume notices changes."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from kit import tiny, tiny_tasks
from kit.jobs import run
from rich.console import Console

import mptrain
from mptrain.data.lm_eval.questions import MultipleChoice
from mptrain.data.tasks.metrics import MEAN, Score
from mptrain.measure.intervals import interval, paired_difference
from mptrain.models.processor import load_processor
from mptrain.recipe import Model
from mptrain.report.render.terminal import summary

TASK = Path(__file__).parents[1] / "kit" / "lm_eval"


OPENVINO = {"id": "ov", "format": "openvino", "of": ["dense", "int4"], "precision": ["fp32", "compressed"]}


def finished(folder, *exports):
    """A run that trains two epochs and rounds the weights to int4; recipe file and report."""
    shutil.copytree(TASK, folder / "lm_eval")
    recipe = tiny_tasks.recipe("causal-lm", folder)
    int4 = {"mode": "weight_only", "method": "rtn", "block_size": 16, "embeddings": "fp32", "lm_head": "fp32"}
    recipe["stages"] = [
        {"id": "dense", "train": {"epochs": 2, "lr": 3e-3, "batch_size": 8}},
        {"id": "int4", "quantize": int4},
    ]
    recipe["export"] = list(exports)
    recipe["evaluate"]["multiple_choice"] = [str(folder / "lm_eval" / "moods.yaml")]
    recipe["gates"] = {"agreement": None, "fused_attention": None, "parity": None}
    file = tiny.write(recipe, folder / "recipe.yaml")
    run(file)
    return file, json.loads((folder / "run" / "report.json").read_text())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choices")
    return folder, *finished(folder, OPENVINO)


def values(report):
    return {v["id"]: v["multiple_choice"]["moods"]["acc"]["value"] for v in report["variants"]}


def test_every_variant_is_scored_and_compared(done):
    folder, _, report = done
    ids = [v["id"] for v in report["variants"]]
    assert ids == ["baseline_fp32", "int4_compressed"]
    assert report["multiple_choice"]["moods"]["questions"] == 30
    assert report["multiple_choice"]["moods"]["guessing"] == pytest.approx(1 / 3)
    kept = {i: json.loads((folder / "run" / "export" / f"{i}.json").read_text()) for i in ids}
    scores = {
        i: {s["name"]: Score(s["name"], np.array(s["stats"]), MEAN) for s in facts["multiple_choice"]["moods"]}
        for i, facts in kept.items()
    }
    for v in report["variants"]:
        for name in ("acc", "acc_norm"):
            score = scores[v["id"]][name]
            measured = v["multiple_choice"]["moods"][name]
            assert measured == {"value": score.value, "unit": "fraction", "n": 30, "ci95": list(interval(score))}
    for c in report["comparisons"]:
        for name in ("acc", "acc_norm"):
            expected = paired_difference(scores[c["id"]][name], scores["baseline_fp32"][name])
            assert c["multiple_choice"]["moods"][name] == {
                "delta": expected.value,
                "delta_ci95": [expected.low, expected.high],
                "verdict": expected.verdict(True),
            }


def test_what_was_learnt_shows(done):
    folder, _, report = done
    assert values(report)["baseline_fp32"] > 0.6, "the grammar says which mood belongs to which noun"
    model = mptrain.load(folder / "run" / report["checkpoints"]["dense"])
    tokenizer = load_processor(Model(path=str(folder / "model"), task="causal-lm"))
    task = MultipleChoice(str(folder / "lm_eval" / "moods.yaml"), tokenizer, 64)
    assert task.evaluate(lambda batch: model(**batch))[0].value == values(report)["baseline_fp32"]


@pytest.mark.long
def test_all_formats_agree(tmp_path):
    precision = ["fp32", "fp16"]
    _, report = finished(
        tmp_path,
        OPENVINO,
        {"id": "coreai", "format": "coreai", "of": ["dense", "int4"], "precision": precision},
        {"id": "coreml", "format": "coreml", "of": ["dense", "int4"], "precision": precision},
    )
    found = values(report)
    assert len(found) == 10
    for stage, first in (("baseline", "baseline_fp32"), ("int4", "int4_compressed")):
        for form in ("coreai", "coreml"):
            assert found[f"{stage}_{form}_fp32"] == found[first]
            assert found[f"{stage}_{form}_fp16"] == pytest.approx(found[first], abs=0.07)


def test_every_page_shows_it(done):
    folder, _, report = done
    run_folder = folder / "run"
    for name in ("report.md", "report.html", "README.md"):
        text = (run_folder / name).read_text()
        assert "moods acc_norm" in text and "guessing" in text and "33.33%" in text
        assert "moods: 30 questions of test, 0-shot." in text
        assert "moods acc: " in text, "a sentence of the verdict"
        assert "windows of 24 tokens, stride 12" in text
    stream = io.StringIO()
    Console(width=120, file=stream).print(summary(report))
    assert "moods acc" in stream.getvalue()


def test_a_resume_with_other_questions_is_refused(done):
    folder, file, _ = done
    assert "is finished" in run(file).stderr
    data = folder / "lm_eval" / "moods.jsonl"
    text = data.read_text()
    data.write_text(text.replace("good", "fine", 1))
    assert "multiple_choice.moods was" in run(file, check=2).stderr
    data.write_text(text)
    assert "is finished" in run(file).stderr


def test_wrong_tasks_are_errors_before_training(tmp_path):
    recipe = tiny_tasks.recipe("causal-lm", tmp_path)
    recipe["evaluate"]["multiple_choice"] = [str(tmp_path / "none.yaml")]
    file = tiny.write(recipe, tmp_path / "recipe.yaml")
    assert "evaluate.multiple_choice: there is no file" in run(file, check=2).stderr
    recipe["evaluate"]["multiple_choice"] = [str(TASK / "moods.yaml")]
    recipe["export"] = [{"id": "ml", "format": "coreml", "of": ["dense"], "shapes": {"length": [1, 8]}}]
    recipe["data"] |= {"max_length": 8, "stride": 4}  # the task alone is too long
    tiny.write(recipe, file)
    assert "export.ml.shapes.length: 8 is less than the 11 tokens" in run(file, check=2).stderr
    assert not (tmp_path / "run" / "stages").exists()
    recipe["model"]["task"] = "text-classification"
    tiny.write(recipe, file)
    assert "evaluate.multiple_choice: is for task causal-lm" in run(file, check=2).stderr
