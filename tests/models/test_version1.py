"""Folders that mptrain wrote while `mptrain_structure` had version 1 (version1/, by write.py.txt at commit a9ba531)."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers as t
from safetensors.torch import load_file

import mptrain
from mptrain.core.errors import ModelError
from mptrain.models import artifact

FOLDERS = sorted(path for path in Path(__file__).with_name("version1").iterdir() if path.is_dir())
PRUNED = [path for path in FOLDERS if "-" not in path.name]


def logits(model, folder):
    batch = load_file(folder / "expected.safetensors")
    expected = batch.pop("expected")
    with torch.no_grad():
        return model(**batch).logits, expected


def assert_close(found, expected):
    """What was written on another CPU: the same but for the order in which it adds."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_every_family_of_that_time_is_here():
    names = {path.name for path in FOLDERS}
    assert names == {
        "bert", "bert-palettized", "bert-quantized", "deit", "distilbert", "llama", "opt", "roberta", "swin", "vit",
        "wav2vec2",
    }  # fmt: skip


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_it_loads_bit_for_bit_and_is_saved_as_version_2(folder, tmp_path):
    model = mptrain.load(folder)
    found, expected = logits(model, folder)
    assert_close(found, expected)

    structure = model.config.mptrain_structure
    assert structure["version"] == 2 and structure["tensors"] and structure["blocks"]
    mptrain.save(model, tmp_path / "again")
    again = mptrain.load(tmp_path / "again")
    assert again.config.mptrain_structure == structure
    assert torch.equal(logits(again, folder)[0], found)


@pytest.mark.parametrize("folder", PRUNED, ids=lambda path: path.name)
def test_its_own_code_still_loads_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    cls = getattr(t, mptrain.load(folder).__class__.__name__)
    auto = next(
        getattr(t, name)
        for name in artifact._read_json(folder / "config.json")["auto_map"]
        if issubclass(cls, t.PreTrainedModel)
    )
    found, expected = logits(auto.from_pretrained(folder, trust_remote_code=True).eval(), folder)
    assert_close(found, expected)
    assert torch.equal(found, logits(mptrain.load(folder), folder)[0]), "bit for bit what mptrain.load gives"


@pytest.mark.parametrize(
    "change",
    [
        ("family", "opt"),
        ("layers", []),
        ("layers", {"0": {"heads": 1, "ffn": 1}}),
        ("layers", {"0": {"heads": 1, "ffn": 6}, "1": 3}),
        ("layers", {"0": {"heads": 0, "ffn": 6}, "1": {"heads": 2, "ffn": 4}}),
        ("layers", {"0": {"heads": 5, "ffn": 6}, "1": {"heads": 2, "ffn": 4}}),
        ("layers", {"0": {"heads": True, "ffn": 6}, "1": {"heads": 2, "ffn": 4}}),
        ("layers", {"0": {"heads": 1, "ffn": "6"}, "1": {"heads": 2, "ffn": 4}}),
        ("layers", {"0": {"heads": 1, "ffn": 10**30}, "1": {"heads": 2, "ffn": 4}}),
        ("layers", {"0": {"heads": 1}, "1": {"heads": 2, "ffn": 4}}),
        ("layers", {"0": {"heads": 2, "ffn": 6}, "1": {"heads": 2, "ffn": 4}}),
    ],
)
def test_a_description_that_does_not_fit(change, tmp_path):
    shutil.copytree(Path(__file__).with_name("version1") / "bert", tmp_path / "m")
    config = artifact._read_json(tmp_path / "m" / "config.json")
    assert config["mptrain_structure"]["layers"] == {"0": {"heads": 1, "ffn": 6}, "1": {"heads": 2, "ffn": 4}}
    config["mptrain_structure"][change[0]] = change[1]
    artifact._write_json(tmp_path / "m" / "config.json", config)
    with pytest.raises(ModelError):
        mptrain.load(tmp_path / "m")
