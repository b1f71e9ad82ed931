"""What a teacher says, asked once: the same numbers, whatever the padding; what is not known is asked."""

from __future__ import annotations

import json

import pytest
import torch
from kit import bare, tiny

from mptrain.core.errors import MptrainError
from mptrain.data.load import load_data
from mptrain.flow import teacher
from mptrain.flow.stage_inputs import inputs_of
from mptrain.models import artifact
from mptrain.models.processor import load_processor
from mptrain.recipe import Distill
from mptrain.recipe.file import read
from mptrain.run import run
from mptrain.train.distill import Distiller
from mptrain.train.taught import Taught, keys_of, write

OPENVINO = {"id": "ov", "format": "openvino", "of": ["dense"], "precision": ["fp32"]}


def batch(*texts, length):
    ids = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def test_a_key_is_of_what_is_read_whatever_the_padding():
    [short, long] = keys_of(batch([7, 8], [7, 8, 9], length=5))
    assert short == keys_of(batch([7, 8], length=2))[0]
    assert short != long
    left = {"input_ids": torch.tensor([[0, 7, 8]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    assert keys_of(left)[0] == short
    segments = {**batch([7, 8], length=2), "token_type_ids": torch.tensor([[0, 1]])}
    assert keys_of(segments) != keys_of({**segments, "token_type_ids": torch.tensor([[0, 0]])})


def test_without_a_mask_padding_is_read_too():
    sounds = {"input_values": torch.tensor([[1.0, 2.0]])}
    assert keys_of(sounds) != keys_of({"input_values": torch.tensor([[1.0, 2.0, 0.0]])})
    assert keys_of(sounds) != keys_of({"input_values": torch.tensor([[1.0], [2.0]])})
    half = {"input_values": sounds["input_values"].bfloat16()}
    assert keys_of(half) == keys_of(half) != keys_of(sounds)


class Counting(torch.nn.Module):
    """The sum of the tokens, and how often it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def forward(self, input_ids, attention_mask):
        self.asked += 1
        total = (input_ids * attention_mask).sum(1).float()
        return {"logits": torch.stack([total, -total], 1), "other": total}


@pytest.mark.parametrize("secret", [None, b"k" * 32], ids=["plain", "encrypted"])
def test_what_was_asked_is_known_in_any_batch_and_the_rest_is_asked(tmp_path, secret):
    distiller, paths = Distiller(Counting(), Distill()), [tmp_path / name for name in "012"]
    for path, texts in zip(paths, [[[7, 8], [9]], [], [[5, 6, 7]]]):  # of a process each, one without a share
        write(path, [batch(*texts, length=4)] if texts else [], distiller.ask, ["logits"], secret)
    distiller.taught = found = Taught.load(paths, secret)
    assert len(found) == 3 and found.outputs.keys() == {"logits"}
    wanted = torch.tensor([[18.0, -18.0], [9.0, -9.0]])
    assert torch.equal(found.of(batch([5, 6, 7], [9], length=3))["logits"], wanted)
    assert found.of(batch([5, 6, 7], [4], length=3)) is None
    asked = distiller.teacher.asked
    student = {"logits": torch.zeros(2, 2)}
    known, unknown = batch([5, 6, 7], [9], length=3), batch([5, 6, 7], [4], length=3)
    ours = distiller(known, student, torch.tensor(0.0)).total
    assert distiller.teacher.asked == asked == 2
    distiller(unknown, student, torch.tensor(0.0))
    assert distiller.teacher.asked == asked + 1
    distiller.taught = None
    assert torch.equal(ours, distiller(known, student, torch.tensor(0.0)).total)
    if secret:
        assert b"logits" not in paths[0].read_bytes()
        with pytest.raises(MptrainError, match="teacher's outputs in the run folder"):
            Taught.load(paths, b"other" * 7)


def stage(name, epochs, **distill):
    return {"id": name, "from": "model", "teacher": "a", "train": {**bare.TRAIN, "epochs": epochs}, "distill": distill}


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([stage("b", 2)], {"b"}),
        ([stage("b", 1)], set()),
        ([stage("b", 0.75), stage("c", 0.5)], {"b", "c"}),
        ([stage("b", 2, hidden=1)], set()),
        ([stage("b", 2, replace_tokens=0.1), stage("c", 0.5)], set()),
        ([stage("b", 1), {**stage("c", 0.5), "teacher": "model"}], set()),
        ([{**stage("b", 1), "teacher": "self"}, {**stage("c", 0.5), "teacher": "model"}], {"b", "c"}),
    ],
    ids=["epochs", "one epoch", "together", "hidden states", "other texts", "two teachers", "self"],
)
def test_a_teacher_is_asked_once_where_stages_would_ask_it_more_often(stages, expected):
    inputs = inputs_of(bare.recipe(*stages, export=[{**OPENVINO, "of": ["a"]}]))
    assert {name for name, one in inputs.items() if one.asked_once} == expected


def described(folder, name, **distill):
    """The tiny recipe without its methods, on texts as they are."""
    found = tiny.jpqd(folder, output={"dir": str(folder / name)}, export=[OPENVINO])
    dense = {**found["stages"][0], "train": {**found["stages"][0]["train"], "epochs": 1}}
    student = {k: v for k, v in found["stages"][1].items() if k not in ("prune", "quantize")}
    return {**found, "stages": [dense, {**student, "from": "model", "distill": {"weight": 1.0, **distill}}]}


def trained(folder, name, monkeypatch, once=True):
    """The rows of the student's training, and how often its teacher was asked."""
    asked = []
    own = Distiller.ask

    def ask(self, inputs):
        asked.append(len(inputs["input_ids"]))
        return own(self, inputs)

    monkeypatch.setattr(Distiller, "ask", ask)
    if not once:
        monkeypatch.setattr(teacher, "fits", lambda data: False)
    report = run(read(str(tiny.write(described(folder, name), folder / f"{name}.yaml"))).recipe)
    monkeypatch.undo()
    return [row for row in report["history"] if row["stage"] == "jpqd"], asked


def test_a_run_asks_once_of_each_example_and_learns_the_same(tmp_path, monkeypatch):
    rows, asked = trained(tmp_path, "once", monkeypatch)
    others, often = trained(tmp_path, "often", monkeypatch, once=False)
    recipe = read(str(tmp_path / "once.yaml")).recipe
    data = load_data(recipe.data, recipe.model.task, load_processor(recipe.model), seed=0)
    assert sum(asked) == len(data.train) and len(asked) == -(-len(data.train) // teacher.BATCH)
    assert sum(often) > 2 * len(data.train)
    losses = [[row["distill_loss"] for row in found if "distill_loss" in row] for found in (rows, others)]
    assert len(losses[0]) > 2 and losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_models_that_say_much_or_something_of_each_token_or_read_padding_are_asked_each_time(tmp_path, monkeypatch):
    recipe = read(str(tiny.write(described(tmp_path, "run"), tmp_path / "a.yaml"))).recipe
    data = load_data(recipe.data, recipe.model.task, load_processor(recipe.model), seed=0)
    assert teacher.fits(data)
    with monkeypatch.context() as less:
        less.setattr(teacher, "MOST", 8 * len(data.train) - 1)  # two classes, four bytes each
        assert not teacher.fits(data)
        less.setattr(teacher, "MOST", 8 * len(data.train))
        assert teacher.fits(data)
    collate = data.collate
    data.collate = lambda examples: {k: v for k, v in collate(examples).items() if k != "attention_mask"}
    assert not teacher.fits(data)
    data.collate, port = collate, data.outputs()[0]
    data.outputs = lambda: (type(port)("logits", (port.axes[0], "tokens", 2)),)
    assert not teacher.fits(data)


def test_the_file_of_a_run_says_what_its_teacher_says(tmp_path, monkeypatch):
    trained(tmp_path, "run", monkeypatch)
    [path] = (tmp_path / "run" / "stages").glob("taught-*.safetensors")
    found, model = Taught.load([path]), artifact.load(tmp_path / "run" / "stages" / "dense" / "0-train" / "model")
    recipe = read(str(tmp_path / "run.yaml")).recipe
    data = load_data(recipe.data, recipe.model.task, load_processor(recipe.model), seed=0)
    inputs = data.without_targets(data.collate([data.train[i] for i in range(20)]))
    with torch.no_grad():
        torch.testing.assert_close(found.of(inputs)["logits"], model.eval()(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["jpqd"]["asked_once"] is True
