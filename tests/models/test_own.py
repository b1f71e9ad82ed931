"""A torch module of a user's own as a model: built, saved and read again, and refused where it does not fit."""

from __future__ import annotations

import textwrap

import pytest
import torch
from kit import tiny
from pydantic import ValidationError
from torch.nn.functional import cross_entropy

from mptrain.core.errors import ModelError
from mptrain.models import artifact
from mptrain.models.load import load_model, read_config, skeleton
from mptrain.models.processor import load_processor
from mptrain.models.samples import guess_task
from mptrain.recipe import Model

LABELS = ["a", "b", "c"]
PICTURES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NET = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, num_labels, width=4):
            super().__init__()
            self.conv = nn.Conv2d(3, width, 3, padding=1)
            self.out = nn.Linear(width, num_labels)

        def forward(self, picture):
            return self.out(torch.relu(self.conv(picture)).mean((2, 3)))

    def seven():
        return Net(7)

    def number():
        return 7

    class Texts(nn.Module):
        def __init__(self, num_labels):
            super().__init__()
            self.table = nn.Embedding(600, num_labels)

        def forward(self, attention_mask, input_ids):
            weight = attention_mask[..., None].float()
            return {"logits": (self.table(input_ids) * weight).sum(1) / weight.sum(1), "more": weight}
"""


@pytest.fixture
def net(tmp_path):
    (tmp_path / "net.py").write_text(textwrap.dedent(NET))
    return tmp_path / "net.py"


def spec(file, name="Net", **fields):
    return Model(**{"module": f"{file}:{name}", "task": "image-classification", "picture": {"size": 8}} | fields)


def test_its_code_runs_only_when_allowed_and_the_seed_draws_its_weights(net):
    with pytest.raises(ModelError, match=r"model\.module: .*net\.py:Net would run code"):
        load_model(spec(net), LABELS, seed=0)
    state = torch.get_rng_state()
    one, same, other = (load_model(spec(net), LABELS, seed=seed, allow_code=True) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one(PICTURES).logits, same(PICTURES).logits)
    assert not torch.equal(one(PICTURES).logits, other(PICTURES).logits)
    assert one.config.id2label == dict(enumerate(LABELS)) and guess_task(one.config) == "image-classification"
    assert torch.equal(one(PICTURES).logits, one.module(PICTURES))


def test_the_loss_is_that_of_the_labels(net):
    model, labels = load_model(spec(net), LABELS, seed=0, allow_code=True), torch.tensor([0, 2, 1, 1])
    assert torch.equal(model(PICTURES, labels=labels).loss, cross_entropy(model.module(PICTURES), labels))


def test_arguments_reach_the_function(net):
    model = load_model(spec(net, arguments={"width": 6}), LABELS, seed=0, allow_code=True)
    assert model.module.conv.out_channels == 6 and model.module.out.out_features == 3


def test_saved_it_needs_neither_its_file_nor_the_recipe(net, tmp_path):
    model = load_model(spec(net), LABELS, seed=0, allow_code=True)
    artifact.save(model, tmp_path / "saved", load_processor(spec(net), allow_code=True))
    net.unlink()
    with pytest.raises(ModelError, match="its code is in the folder and would be run"):
        artifact.load(tmp_path / "saved")
    assert torch.equal(artifact.load(tmp_path / "saved", allow_code=True)(PICTURES).logits, model(PICTURES).logits)
    again = Model(path=str(tmp_path / "saved"), task="image-classification")
    with pytest.raises(ModelError, match=r"is built by code that it holds, net\.py:Net"):
        read_config(again)
    config = read_config(again, allow_code=True)
    assert guess_task(config) == "image-classification" and config.image_size == [8, 8]
    assert skeleton(again, config, allow_code=True).module.out.weight.is_meta
    loaded = load_model(again, LABELS, seed=9, allow_code=True)
    assert torch.equal(loaded(PICTURES).logits, model(PICTURES).logits)


def test_texts_by_name_with_the_tokenizer_of_a_folder(net, tmp_path):
    tiny.save_bert(tmp_path / "bert")
    given = spec(net, "Texts", task="text-classification", path=str(tmp_path / "bert"), picture=None)
    tokenizer = load_processor(given, allow_code=True)
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    model = load_model(given, LABELS, seed=0, allow_code=True)
    batch = tokenizer(["good film", "bad"], padding=True, return_tensors="pt")
    rows = [model.module.table.weight[row[mask.bool()]].mean(0) for row, mask in zip(*batch.values())]
    torch.testing.assert_close(model(**batch).logits, torch.stack(rows))


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("Nett", {}, r"defines no 'Nett' that can be called; it defines Net, seven, number, Texts"),
        ("seven", {}, r"gives logits \[2, 7\] for 2 pictures, and the data has 3 classes: take num_labels"),
        ("number", {}, "gives int, no torch.nn.Module"),
        ("Net", {"arguments": {"wide": 2}}, "does not take model.arguments {'wide': 2, 'num_labels': 3}"),
        ("Net", {"picture": None}, r"model\.picture: how pictures are given to model\.module is not said"),
        ("Texts", {}, r"does not run on pictures \[2, 3, 8, 8\]"),
        ("Net", {"task": "text-classification"}, r"model\.path: task text-classification needs a tokenizer"),
        ("Net", {"task": "question-answering"}, "what a module of one's own learns from for task question-answering"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(net, name, fields, said):
    with pytest.raises(ModelError, match=said):
        load_processor(spec(net, name, **fields), allow_code=True) if fields.get("task") == "text-classification" else (
            load_model(spec(net, name, **fields), LABELS, seed=0, allow_code=True)
        )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"path": ""}, "path: say where the model is, or give a torch module of your own as module"),
        ({"path": "x", "picture": {"size": 8}}, "picture: is for module"),
        ({"module": "net.py"}, "module"),
        ({"module": "net.py:Net", "modeling": "m.py"}, "modeling: is for a saved model, and module is given"),
        ({"module": "net.py:Net", "dropout": 0.1}, "dropout: is for a saved model"),
        ({"module": "net.py:Net", "path": "x", "picture": {"size": 8}}, "picture: the image processor of path"),
    ],
)
def test_fields_that_contradict_each_other(fields, said):
    with pytest.raises(ValidationError, match=said):
        Model(task="image-classification", **fields)
