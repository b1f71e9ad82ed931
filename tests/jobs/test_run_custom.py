"""A model with code of its own and a tokenizer that is not fast, through a whole run."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from kit import tiny
from transformers import ByT5Tokenizer

from mptrain.core.errors import ModelError
from mptrain.data.sources import modeling_aquila
from mptrain.models.processor import load_processor
from mptrain.recipe import Model, file
from mptrain.run import run


@pytest.fixture
def folder(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = modeling_aquila.AquilaConfig(**sizes, max_position_embeddings=64, pad_token_id=0, eos_token_id=1)
    modeling_aquila.AquilaForCausalLM(config).save_pretrained(tmp_path / "aquila")
    ByT5Tokenizer(model_max_length=64).save_pretrained(tmp_path / "aquila")
    shutil.copy(modeling_aquila.__file__, tmp_path / "aquila")
    return tmp_path / "aquila"


def recipe(folder, tmp_path):
    (tmp_path / "text.txt").write_text("a good film and a bad plot\n" * 60)
    return {
        "schema": "mptrain/v1",
        "name": "custom",
        "model": {"path": str(folder), "modeling": "modeling_aquila.py", "task": "causal-lm"},
        "data": {"train": str(tmp_path / "text.txt"), "max_length": 32},
        "stages": [{"id": "dense", "train": {"epochs": 1, "lr": 1e-3, "batch_size": 8}}],
        "export": [{"id": "ov", "format": "openvino", "of": ["dense"], "precision": ["fp32"], "cache": 32}],
        "evaluate": {"latency": {"batch": [1], "length": [16], "threads": [1], "runs": 1, "throughput": True}},
        "output": {"dir": str(tmp_path / "run")},
    }


def test_its_code_runs_when_allowed_is_shipped_and_its_export_agrees(folder, tmp_path):
    described = file.validate(recipe(folder, tmp_path), "test")
    with pytest.raises(ModelError, match=r"model\.modeling: modeling_aquila\.py would run code.*--allow-code"):
        run(described)
    report = run(described, allow_code=True)
    (variant,) = report["variants"]
    assert variant["parity"]["relative"] < 1e-5 and variant["runtime"]["cache"] == 32
    assert set(variant["throughput"]) == {"b1_s16_t1"} and variant["throughput"]["b1_s16_t1"]["median"] > 0
    out = tmp_path / "run" / variant["path"].rpartition("/")[0]
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "modeling_aquila.AquilaConfig",
        "AutoModelForCausalLM": "modeling_aquila.AquilaForCausalLM",
    }
    assert (out / "modeling_aquila.py").read_text() == (folder / "modeling_aquila.py").read_text()


def test_complex_numbers_without_a_real_form_are_named_before_training(folder, tmp_path):
    code = (folder / "modeling_aquila.py").read_text()
    assert "torch.polar(" in code
    odd = "torch.sinh(1e-9j * torch.ones(1)) + torch.polar("
    (folder / "modeling_aquila.py").write_text(code.replace("torch.polar(", odd))
    with pytest.raises(ModelError, match=r"model\.modeling: .*complex numbers.*but not sinh"):
        run(file.validate(recipe(folder, tmp_path), "test"), allow_code=True)
    assert not (tmp_path / "run" / "stages").exists()


def test_optimum_generates_from_the_folder(folder, tmp_path):
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoTokenizer

    described = file.validate(recipe(folder, tmp_path) | {"gates": {}}, "test")
    report = run(described, allow_code=True)
    out = tmp_path / "run" / report["variants"][0]["path"].rpartition("/")[0]
    loaded = OVModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    given = AutoTokenizer.from_pretrained(out)("a good", return_tensors="pt", add_special_tokens=False)
    assert loaded.generate(**given, max_new_tokens=8, do_sample=False).shape[1] > given["input_ids"].shape[1]


def test_a_tokenizer_that_is_not_fast_is_refused_where_offsets_are_needed(tmp_path):
    tiny.save_bert(tmp_path / "bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bert" / name).unlink()
    ByT5Tokenizer(model_max_length=64).save_pretrained(tmp_path / "bert")
    assert not load_processor(Model(path=str(tmp_path / "bert"), task="text-classification")).is_fast
    for task in ("question-answering", "token-classification"):
        with pytest.raises(ModelError, match=f"no fast tokenizer.*task {task} has to know which characters"):
            load_processor(Model(path=str(tmp_path / "bert"), task=task))
