"""`mptrain verify` of what a runtime executes here: facts of the file, and the comparison with its source."""

from __future__ import annotations

import json

import pytest
from kit import tiny
from kit.long import except_for

from mptrain.cli import main


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    for name in ("plain", "other"):
        tiny.save_bert(folder / name)
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder / "other")
    model.classifier.weight.data.neg_()
    model.save_pretrained(folder / "other")
    (folder / "texts.txt").write_text("good film\nbad plot was not so good\n" * 8)
    return folder


def verify(capsys, *words):
    status = main(["verify", *map(str, words)])
    shown = capsys.readouterr()
    return status, " ".join(shown.out.split()), shown.err


@pytest.mark.parametrize(
    ("format", "ending"),
    except_for([("openvino", "xml"), ("onnx", "onnx"), ("coreai", "aimodel")], [("openvino", "xml"), ("onnx", "onnx")]),
)
def test_what_it_holds_and_whether_it_is_its_source(bert, tmp_path, capsys, format, ending):
    words = ("--format", format, "--precision", "int8-weights", "--to", tmp_path / "out", "--samples", 8)
    assert main(["export", str(bert / "plain"), *map(str, words)]) == 0
    (model,) = (tmp_path / "out").glob(f"*.{ending}")
    status, out, err = verify(capsys, model)
    assert status == 0, err
    assert "attention: 2 of 2 as one operation" in out and "not compared: --model SOURCE" in out
    facts = tmp_path / "facts.json"
    data = ("--data", bert / "texts.txt", "--json", facts)
    status, out, err = verify(capsys, tmp_path / "out", "--model", bert / "plain", *data)  # the folder has only one
    assert status == 0 and "is the source model" in out, err
    found = json.loads(facts.read_text())
    assert found["parity"]["examples"] == 16 and found["parity"]["relative"] < 0.01
    assert any(kind.lower() in ("i8", "int8") for kind in found["runtime"]["weight_types"])
    status, out, err = verify(capsys, model, "--model", bert / "other", *data)
    assert status == 1 and "is not the source model" in out and "its outputs are wrong" in err


def test_heads_are_named_to_be_compared(bert, tmp_path, capsys):
    """A file with heads gives other outputs than its source: `--head` says which, as it did for the export."""
    heads = ("--head", "softmax", "--head", "topk=2")
    assert main(["export", str(bert / "plain"), "--to", str(tmp_path / "out"), "--samples", "8", *heads]) == 0
    data = ("--model", bert / "plain", "--data", bert / "texts.txt")
    status, out, err = verify(capsys, tmp_path / "out", *data, *heads)
    assert status == 0 and "is the source model" in out, err
    status, _, err = verify(capsys, tmp_path / "out", *data, "--head", "pool=mean")
    assert status == 2 and "pool is no head for task text-classification" in err
    status, _, err = verify(capsys, tmp_path / "out", *heads)
    assert status == 2 and "give --model too" in err


@pytest.mark.parametrize(
    ("path", "said"),
    [("nowhere", "there is no such file"), ("plain", "this is none"), ("texts.txt", "give an exported model (.xml, ")],
)
def test_what_is_no_exported_model_is_refused(bert, capsys, path, said):
    status, _, err = verify(capsys, bert / path)
    assert status == 2 and said in err


def test_a_damaged_model_and_a_useless_option_are_refused(tmp_path, capsys):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    status, _, err = verify(capsys, tmp_path)
    assert status == 1 and "model.onnx" in err and "Traceback" not in err
    status, _, err = verify(capsys, tmp_path, "--precision", "fp16")
    assert status == 2 and "is for Core ML packages" in err
