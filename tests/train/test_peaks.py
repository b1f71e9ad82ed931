"""The examples with the largest activations in training: found, kept over a resume, and read by an fp16 export."""

from __future__ import annotations

import csv
import json
import random

import numpy as np
import pytest
import torch
from kit import tiny
from kit.jobs import run
from torch import nn
from transformers import BertForSequenceClassification

from mptrain.export.coreml.convert import export_coreml
from mptrain.flow import stage as stages
from mptrain.mil.interpreter import Interpreter
from mptrain.models import artifact
from mptrain.recipe import CoreMlShapes
from mptrain.train import peaks
from mptrain.train.peaks import Peaks
from mptrain.verify.overflow import compare


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False)
        nn.init.ones_(self.up.weight)
        nn.init.constant_(self.down.weight, -1.0)

    def forward(self, x):
        return self.down(self.up(x).relu())


def batch(*rows):
    return {"x": torch.tensor(rows), "labels": torch.zeros(len(rows))}


def seen(watch, model, inputs):
    model(inputs["x"])
    watch.step({"x": inputs["x"]})


def test_each_module_keeps_its_largest_output_and_the_example_that_gave_it(tmp_path):
    model = Two().train()
    watch = Peaks(model, tmp_path / "peaks-0.safetensors")
    seen(watch, model, batch([1.0, 2.0], [-9.0, 1.0]))  # up: 3 and -8, down: -9 and 0
    assert watch.largest == {"up": 8, "down": 9}
    seen(watch, model, batch([1.0, 1.0], [float("nan"), 0.0]))
    assert watch.largest == {"up": 8, "down": 9}
    with torch.no_grad():
        model.eval()
        seen(watch, model, batch([100.0, 0.0]))
        model.train()
    assert watch.largest == {"up": 8, "down": 9}, "training alone counts"
    seen(watch, model, batch([3.0, 1.0], [1.0, 0.0]))
    assert watch.largest == {"up": 8, "down": 12}
    watch.save()
    watch.remove()
    seen(watch, model, batch([50.0, 50.0]))
    assert watch.largest == {"up": 8, "down": 12} and not model.up._forward_hooks

    found = peaks.batches([tmp_path / "none", tmp_path])
    assert [set(b) for b in found] == [{"x"}] * 2, "no targets"
    assert [b["x"].tolist() for b in found] == [[[3.0, 1.0]] * 2, [[-9.0, 1.0]] * 2], "the largest value first"
    assert peaks.batches([tmp_path / "none"]) == []


def test_a_resumed_watch_ends_with_the_file_of_one_that_was_not_stopped(tmp_path):
    draw = torch.Generator().manual_seed(0)
    steps = [{"x": torch.randn(4, 2, generator=draw)} for _ in range(6)]
    whole, stopped = tmp_path / "peaks-0.safetensors", tmp_path / "peaks-1.safetensors"
    for path, parts in ((whole, [range(6)]), (stopped, [range(4), range(3, 6)])):  # step 3 is done again
        for part in parts:
            model = Two().train()
            watch = Peaks(model, path)
            watch.load()
            for step in part:
                seen(watch, model, steps[step])
            watch.save()
    assert whole.read_bytes() == stopped.read_bytes() and sorted(p.name for p in tmp_path.iterdir()) == [
        whole.name,
        stopped.name,
    ]


def test_an_overflow_in_half_precision_is_the_largest(tmp_path):
    model = Two().half().train()
    watch = Peaks(model, tmp_path / "peaks-0.safetensors")
    seen(watch, model, {"x": torch.tensor([[1.0, 1.0], [6e4, 6e4]], dtype=torch.float16)})
    assert watch.largest == {"up": float("inf"), "down": float("inf")}
    watch.save()
    (found,) = peaks.batches([tmp_path])
    assert found["x"].tolist() == [[6e4, 6e4]] * 2


RARE = "so"
ROWS, RARE_ROW = 160, 3
SEED = 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A recipe whose training has one text with a word whose embedding, 4e4, overflows where it is added twice."""
    folder = tmp_path_factory.mktemp("peaks")
    recipe = tiny.jpqd(folder)
    model = BertForSequenceClassification.from_pretrained(folder / "bert")
    rare = len(tiny.SPECIAL) + tiny.WORDS.index(RARE)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[rare] = 4e4 * torch.sign(torch.randn(32))
        model.bert.embeddings.position_embeddings.weight[9] = model.bert.embeddings.word_embeddings.weight[rare]
    model.save_pretrained(folder / "bert")
    draw = random.Random(0)
    words = [w for w in tiny.WORDS if w != RARE]
    for split, rows in (("train", ROWS), ("validation", 24), ("test", 24)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for row in range(rows):
                text = [draw.choice(words) for _ in range(12)]
                if (split, row) == ("train", RARE_ROW):
                    text[8] = RARE  # at position 9, after [CLS]
                writer.writerow([" ".join(text), ["rotten", "fresh"][row % 2]])
    recipe["data"] = {
        **{split: str(folder / f"{split}.csv") for split in ("train", "validation", "test")},
        "max_length": 32,
    }
    recipe["stages"] = [{"id": "dense", "train": {"epochs": 1, "lr": 1e-4, "batch_size": 16, "weight_decay": 0.0}}]
    shapes = {"kind": "ranged", "batch": [1, 64], "length": [1, 32]}
    recipe["export"] = [{"id": "phone", "format": "coreml", "of": ["dense"], "precision": ["fp16"], "shapes": shapes}]
    recipe["seed"] = SEED
    run(tiny.write(recipe, folder / "tiny.yaml"))
    return folder / "run", recipe


@pytest.mark.long
def test_an_export_is_right_on_what_only_training_has_seen(trained, tmp_path):
    trained, _ = trained
    assert RARE_ROW not in random.Random(SEED).sample(range(ROWS), 64), "no calibration text has the word"
    variant = json.loads((trained / "report.json").read_text())["variants"][0]
    half = variant["runtime"]["half"]
    assert not half["all_half"]["finite"] and half["kept_fp32"] and half["float_casts"] == half["casts"]
    (stage,) = (trained / "stages" / "dense").iterdir()
    watched = peaks.batches([stage])
    rare = len(tiny.SPECIAL) + tiny.WORDS.index(RARE)
    assert len(watched) <= peaks.KEPT and any((b["input_ids"] == rare).any() for b in watched)

    model = artifact.load(stage / "model").eval()
    text = watched[0]
    assert (text["input_ids"][:, 9] == rare).all(), "the largest of all"
    with torch.no_grad():
        expected = {"logits": model(**text).logits}

    def right(package):
        found = Interpreter(package)(text)["logits"]
        return bool(np.isfinite(found).all()) and compare(expected, {"logits": torch.as_tensor(found).float()}).right()

    others = [b for b in watched if not (b["input_ids"] == rare).any()]
    shapes = CoreMlShapes(kind="ranged", batch=[1, 64], length=[1, 32])
    blind = export_coreml(model, text, tmp_path / "out", precision="fp16", shapes=shapes, calibration=others)
    assert blind.half["kept_fp32"] == {} and not right(blind.package), "what a calibration without it gives"
    assert right(trained / variant["path"])


@pytest.mark.long
def test_a_stopped_training_continues_to_the_same_examples(trained, tmp_path, monkeypatch):
    whole, recipe = trained
    recipe = json.loads(json.dumps(recipe))
    recipe["output"]["dir"] = str(tmp_path / "run")
    recipe["export"] = [{"id": "ov", "format": "openvino", "of": ["dense"], "precision": ["fp16"]}]
    path = tiny.write(recipe, tmp_path / "recipe.yaml")
    train_phase, steps = stages.training.train_phase, []

    def stopping(*args, stop, **kwargs):
        return train_phase(*args, stop=lambda: bool(steps.append(1)) or len(steps) == 4, **kwargs)

    monkeypatch.setattr(stages.training, "train_phase", stopping)
    run(path, check=130)
    (stage,) = (tmp_path / "run" / "stages" / "dense").iterdir()
    assert list(stage.glob("checkpoint-4")) and list(stage.glob("peaks-0.safetensors"))
    run(path)
    name = f"stages/dense/{stage.name}/peaks-0.safetensors"
    assert len(steps) > 4 and (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()
