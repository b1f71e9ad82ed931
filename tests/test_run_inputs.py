"""What is known before any training is said before any training, and costs nothing that is there."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from test_run import run
from transformers import ElectraConfig, ElectraForSequenceClassification

from mptrain.cli import main


def dense(folder, **train):
    described = tiny.jpqd(folder)
    described["stages"] = described["stages"][:1]
    described["stages"][0]["train"] |= {"epochs": 1} | train
    described["export"][0] |= {"of": ["dense"], "precision": ["fp32"]}
    return described


@pytest.fixture
def electra(tmp_path):
    """A model of none of the families that can be pruned."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ElectraConfig(vocab_size=40, intermediate_size=64, max_position_embeddings=64, **sizes)
    ElectraForSequenceClassification(config).save_pretrained(tmp_path / "electra")
    tiny.tokenizer().save_pretrained(tmp_path / "electra")
    return str(tmp_path / "electra")


def test_a_model_of_no_family_runs_without_pruning(electra, tmp_path, capsys):
    described = dense(tmp_path)
    described["model"]["path"] = electra
    described["gates"] = {"fused_attention": None}
    recipe = tiny.write(described, tmp_path / "recipe.yaml")
    assert main(["recipe", str(recipe), "--dry-run"]) == 0
    assert "baseline_fp32" in capsys.readouterr().out
    run(recipe)
    (variant,) = json.loads((tmp_path / "run" / "report.json").read_text())["variants"]
    assert variant["macs"] is None and variant["params"] > 0


def test_a_model_of_no_family_is_not_pruned_after_training(electra, tmp_path):
    described = tiny.jpqd(tmp_path)
    described["model"]["path"] = electra
    done = run(tiny.write(described, tmp_path / "recipe.yaml"), check=2)
    assert "has no attention layers that can be pruned" in done.stderr
    assert not (tmp_path / "run" / "stages").exists()


def test_fresh_keeps_the_run_where_the_new_one_cannot_begin(tmp_path):
    recipe = tiny.write(dense(tmp_path), tmp_path / "recipe.yaml")
    run(recipe)
    report = (tmp_path / "run" / "report.json").read_bytes()
    missing = f"data.train={tmp_path / 'typo.csv'}"
    assert "typo.csv" in run(recipe, "--fresh", "--set", missing, check=2).stderr
    run(recipe, "--set", "output.resume=never", "--set", missing, check=2)
    assert (tmp_path / "run" / "report.json").read_bytes() == report


def test_a_dry_run_runs_no_code_of_the_model(tmp_path, capsys):
    described = dense(tmp_path)
    config = tmp_path / "bert" / "config.json"
    facts = json.loads(config.read_text()) | {"model_type": "evil", "auto_map": {"AutoConfig": "conf.EvilConfig"}}
    config.write_text(json.dumps(facts))
    (tmp_path / "bert" / "conf.py").write_text(
        f"from transformers import PretrainedConfig\nopen({str(tmp_path / 'ran')!r}, 'w')\n"
        "class EvilConfig(PretrainedConfig):\n    model_type = 'evil'\n"
    )
    assert main(["recipe", str(tiny.write(described, tmp_path / "recipe.yaml")), "--dry-run"]) == 2
    assert "model.path" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_a_dry_run_names_a_planning_type_that_is_none(tmp_path, capsys):
    described = dense(tmp_path)
    described["model"]["path"] = "nobody/nothing"
    described["planning"] = {"model_type": "nonsense"}
    assert main(["recipe", str(tiny.write(described, tmp_path / "recipe.yaml")), "--dry-run"]) == 2
    assert "planning.model_type" in capsys.readouterr().err


def test_allowed_code_reaches_every_stage_and_export(tmp_path):
    described = dense(tmp_path)
    file = tmp_path / "modeling_own.py"
    file.write_text(
        "from transformers import BertForSequenceClassification\nclass Own(BertForSequenceClassification):\n    pass\n"
    )
    described["model"]["modeling"] = str(file)
    described["stages"].append({"id": "q", "quantize": {"mode": "weight_only", "method": "rtn", "block_size": 16}})
    described["export"][0] |= {"of": ["dense", "q"], "precision": ["fp32", "compressed"]}
    run(tiny.write(described, tmp_path / "recipe.yaml"), "--allow-code")
    assert len(json.loads((tmp_path / "run" / "report.json").read_text())["variants"]) == 2
