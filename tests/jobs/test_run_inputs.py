"""What is known before any training is said before any training, and costs nothing that is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from kit import tiny
from kit.jobs import run
from transformers import BertModel, ElectraConfig, ElectraForSequenceClassification

from mptrain.cli import main
from mptrain.flow.identity import models
from mptrain.flow.preflight import untrained
from mptrain.flow.run_folder import check_identity, locked
from mptrain.recipe import file as recipe_file
from mptrain.report.render import files


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


def test_an_architecture_that_nobody_listed_runs(electra, tmp_path, capsys):
    described = dense(tmp_path)
    described["model"]["path"] = electra
    described["gates"] = {"fused_attention": None}
    recipe = tiny.write(described, tmp_path / "recipe.yaml")
    assert main(["recipe", str(recipe), "--dry-run"]) == 0
    assert "baseline_fp32" in capsys.readouterr().out
    run(recipe)
    (variant,) = json.loads((tmp_path / "run" / "report.json").read_text())["variants"]
    assert variant["macs"] > 0 and variant["params"] > 0, "its blocks are found by what it computes"


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


def test_other_weights_in_the_same_folder_are_another_run(tmp_path):
    recipe = tiny.write(dense(tmp_path), tmp_path / "recipe.yaml")
    run(recipe)
    weights = tmp_path / "bert" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "models.model.path was" in run(recipe, check=2).stderr


def test_teachers_and_modeling_files_are_known_by_their_content(tmp_path):
    described = dense(tmp_path)
    code = tmp_path / "modeling.py"
    code.write_text("one")
    teacher = described["model"]["path"]
    described["stages"][0] |= {"teacher": teacher, "distill": {"weight": 0.5}}
    described["model"] |= {"path": "packaged:minilm-l6", "modeling": str(code)}
    recipe = recipe_file.validate(described, "test")
    before = models(recipe)
    assert sorted(before) == ["model.modeling", "stages.dense.teacher"]
    code.write_text("two")
    (Path(teacher) / "notes.md").write_text("nothing that is read")
    after = models(recipe)
    assert before["stages.dense.teacher"] == after["stages.dense.teacher"]
    assert before["model.modeling"] != after["model.modeling"]


def test_other_threads_are_said_and_do_not_stop_a_resume(tmp_path, caplog):
    found = {"format": 2, "recipe": {}, "machine": {"threads": 2, "gpu": False}}
    check_identity(tmp_path, found)
    check_identity(tmp_path, {"format": 2, "recipe": {}, "machine": {"threads": 1, "gpu": False}})
    assert "machine.threads was 2 and is 1; the last bits" in caplog.text


def test_stages_of_another_run_are_taken_over_on_request(tmp_path):
    recipe = tiny.write(dense(tmp_path), tmp_path / "recipe.yaml")
    run(recipe)
    changed = ["--set", "gates.parity=0.5", "--set", "evaluate.floor=false"]
    refused = run(recipe, *changed, check=2).stderr
    assert "recipe.gates.parity was" in refused and f"--reuse {tmp_path / 'run'}" in refused
    changed += ["--set", f"output.dir={tmp_path / 'other'}", "--reuse"]
    assert "holds no run" in run(recipe, *changed, str(tmp_path / "nowhere"), check=2).stderr
    itself = run(recipe, "--fresh", "--reuse", str(tmp_path / "run"), check=2).stderr
    assert "is the run that --fresh deletes" in itself and (tmp_path / "run" / "report.json").exists()
    assert not (tmp_path / "other").exists()
    with locked(tmp_path / "run"):
        assert "still going on" in run(recipe, *changed, str(tmp_path / "run"), check=2).stderr
    run(recipe, *changed, str(tmp_path / "run"))
    ours, theirs = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("other", "run"))
    assert ours["wall_s"]["dense/train"] == theirs["wall_s"]["dense/train"]
    assert ours["variants"][0]["metrics"] == theirs["variants"][0]["metrics"]
    assert {g["name"]: g["limit"] for g in ours["gates"]}["parity"] == 0.5


def test_validate_knows_exports_that_make_nothing(tmp_path, capsys):
    recipe = tiny.write(tiny.jpqd(tmp_path), tmp_path / "recipe.yaml")
    assert main(["validate", str(recipe), "--set", "export.ov.of=[]"]) == 2
    assert f"{recipe}: export.ov.of: names no stage" in capsys.readouterr().err


def ptq_of(folder, model):
    described = dense(folder)
    described["model"]["path"] = str(model)
    described["stages"] = [{"id": "ptq", "quantize": {"mode": "ptq", "ignore": "auto", "max_drop": 0.1}}]
    described["export"][0] |= {"of": ["model", "ptq"], "precision": ["fp32", "int8"]}
    described["output"]["dir"] = str(folder / "ptq")
    return tiny.write(described, folder / "ptq.yaml")


@pytest.mark.long
def test_a_model_that_is_trained_already_is_the_baseline_of_its_quantization(tmp_path):
    run(tiny.write(dense(tmp_path, epochs=3), tmp_path / "recipe.yaml"))
    recipe = ptq_of(tmp_path, tmp_path / "run" / "stages" / "dense" / "0-train" / "model")
    run(recipe)
    before, after = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("run", "ptq"))
    assert [v["id"] for v in after["variants"]] == ["baseline_fp32", "ptq_int8"]
    assert after["variants"][0]["metrics"] == before["variants"][0]["metrics"]
    assert [c["vs"] for c in after["comparisons"]] == ["baseline_fp32"]
    found = after["methods"]["ptq"]["facts"]["quantize"]["restored"]
    assert found["metric"] == "accuracy" and found["drop"] <= 0.1 and found["evaluations"] == 1 and not found["ignore"]
    assert "finished" in run(recipe).stderr


def test_a_model_without_a_trained_head_is_not_quantized_as_it_is(tmp_path):
    folder = tmp_path / "bert"
    recipe = ptq_of(tmp_path, folder)
    base = BertModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    base.save_pretrained(folder)
    before = list((tmp_path / "ptq").glob("*")) if (tmp_path / "ptq").exists() else []
    message = run(recipe, check=2).stderr
    assert "has no head that is trained" in message and "model, ptq, which are exported" in message
    assert [p for p in (tmp_path / "ptq").glob("*") if p.name not in ("lock", ".lock-holder")] == before


@pytest.mark.long
def test_classes_of_other_names_are_taken_by_position_also_where_nothing_trains(tmp_path, caplog):
    recipe = ptq_of(tmp_path, tmp_path / "bert")
    config = tmp_path / "bert" / "config.json"
    names = {"id2label": {"0": "POSITIVE", "1": "NEGATIVE"}, "label2id": {"POSITIVE": 0, "NEGATIVE": 1}}
    config.write_text(json.dumps(json.loads(config.read_text()) | names))
    assert "are taken by position" in run(recipe).stderr


def stages(*found):
    described = {"schema": "mptrain/v1", "name": "x", "output": {"dir": "runs/x"}, "data": {"train": "x.csv"}}
    described["model"] = {"path": "packaged:minilm-l6", "task": "text-classification"}
    described["stages"] = list(found)
    described["export"] = [{"id": "ov", "format": "openvino", "of": [s["id"] for s in found], "precision": ["fp32"]}]
    return described


def test_a_head_may_be_trained_by_any_stage_of_the_chain():
    prune = {"id": "p", "prune": {"method": "magnitude", "keep": {"encoder_params": 0.5}}}
    train = {"id": "ft", "train": {"epochs": 1, "lr": 1e-4}}
    described = stages(prune, train)
    assert untrained(recipe_file.validate(described, "x")) == ["p"]
    described["export"][0]["of"] = ["ft"]
    assert untrained(recipe_file.validate(described, "x")) == []
    described = stages(train, prune | {"from": "model"})
    described["export"][0]["of"] += ["model"]
    assert untrained(recipe_file.validate(described, "x")) == ["p", "model"]
    assert untrained(recipe_file.validate(stages(train, prune), "x")) == []


@pytest.mark.long
def test_nothing_taken_over_is_said(tmp_path):
    recipe = tiny.write(dense(tmp_path), tmp_path / "recipe.yaml")
    run(recipe)
    other = ["--set", f"output.dir={tmp_path / 'other'}", "--set", "seed=7", "--reuse", str(tmp_path / "run")]
    assert "nothing is taken over" in run(recipe, *other).stderr


@pytest.mark.long
def test_a_run_of_an_earlier_version_is_refused_and_says_how_to_print_its_report(tmp_path):
    recipe = tiny.write(dense(tmp_path), tmp_path / "recipe.yaml")
    run(recipe)
    found = json.loads((tmp_path / "run" / "run.json").read_text())
    del found["format"], found["stages"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(found))
    assert f"mptrain report {tmp_path / 'run'}" in run(recipe, check=2).stderr
    other = run(recipe, "--set", f"output.dir={tmp_path / 'other'}", "--reuse", str(tmp_path / "run"))
    assert "another version of mptrain made it" in other.stderr


def test_a_page_that_cannot_be_drawn_or_written_never_costs_a_run(tmp_path, monkeypatch):
    """The numbers are there, the command ends well, and says how to have the page."""

    def broken(report):
        raise KeyError("a method of tomorrow")

    recipe = tiny.write(dense(tmp_path), tmp_path / "recipe.yaml")
    with monkeypatch.context() as patched:
        patched.setitem(files.PAGES, "report.html", broken)
        done = run(recipe)
        assert main(["report", str(tmp_path / "run")]) == 1
    folder = tmp_path / "run"
    assert "report.html cannot be drawn (KeyError: 'a method of tomorrow')" in done.stderr
    assert (
        f"`mptrain report {folder}` draws it again" in done.stderr
        and f"Report: {folder / 'report.json'}" in done.stdout
    )
    assert sorted(p.name for p in folder.glob("*.*") if p.suffix in (".md", ".html")) == ["README.md", "report.md"]
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").is_file()
    (folder / "report.json").unlink()
    (folder / "report.md").unlink()
    (folder / "report.md").mkdir()
    done = run(recipe)
    assert "cannot be written (Is a directory)" in done.stderr and f"`mptrain report {folder}` writes" in done.stderr
    assert json.loads((folder / "report.json").read_text())["variants"]
