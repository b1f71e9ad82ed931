"""Palettization as stages of a recipe: alone, after pruning, with training, stopped and resumed."""

import json

import pytest
import torch
from kit import tiny

from mptrain.cli import main
from mptrain.compress.weights import records
from mptrain.core.errors import RecipeError
from mptrain.flow import stage as stages
from mptrain.models import artifact
from mptrain.recipe.file import read
from mptrain.report.tables.results import methods
from mptrain.run import run
from mptrain.train.interrupt import Stopped


def load(path):
    return read(str(path)).recipe


def described(folder, **changes):
    skm = {"method": "skm", "bits": 3, "group_size": 8}
    found = tiny.jpqd(folder)
    found["stages"] = [
        {"id": "dense", "train": {"epochs": 4, "lr": 3e-3, "batch_size": 8}},
        {"id": "skm", "from": "dense", "palettize": skm},
        {
            "id": "small",
            "from": "dense",
            "teacher": "dense",
            "train": {"epochs": 2, "lr": 2e-3, "batch_size": 8, "checkpoint_steps": 7},
            "prune": {"method": "magnitude", "keep": {"encoder_params": 0.6}},
            "palettize": skm
            | {"embeddings": False, "finetune": {"refresh": 5}, "overrides": {"classifier": {"bits": 4}}},
            "distill": {"weight": 0.5},
        },
    ]
    found["export"] = [{"id": "ov", "format": "openvino", "of": ["dense", "skm", "small"], "precision": ["fp32"]}]
    return found | changes


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("palettize")
    path = tiny.write(described(folder), folder / "recipe.yaml")
    return folder, run(load(path))


@pytest.mark.long
def test_stages_end_with_tables_that_the_exports_repeat(finished):
    folder, report = finished
    scores = {v["id"]: v["metrics"]["accuracy"]["value"] for v in report["variants"]}
    assert set(scores) == {"baseline_fp32", "skm_fp32", "small_fp32"}
    assert min(scores.values()) > scores["baseline_fp32"] - 0.15
    assert all(v["parity"]["max_abs_diff"] < 1e-4 for v in report["variants"])
    for stage, bits in (("skm", 3), ("small", 3)):
        found = records.of(artifact.load(folder / "run" / report["checkpoints"][stage]))
        assert found["bert.encoder.layer.0.attention.self.query.weight"].bits == bits
        assert {row["weight"] for row in report["compressed"][stage]} == set(found)
    small = records.of(artifact.load(folder / "run" / report["checkpoints"]["small"]))
    assert not [name for name in small if "embeddings" in name]
    assert small["bert.encoder.layer.0.intermediate.dense.weight"].shape[0] < 64, "pruned first"
    assert small["classifier.weight"].bits == 4


@pytest.mark.long
def test_the_report_says_what_is_stored_and_what_openvino_expands(finished):
    folder, report = finished
    assert any("OpenVINO has no look-up tables" in note and "skm_fp32, small_fp32" in note for note in report["notes"])
    text = (folder / "run" / "report.md").read_text()
    assert "## Compressed weights" in text and "3-bit palettization (sensitive k-means" in text
    assert "Compressed weights" in (folder / "run" / "report.html").read_text()
    history = [r for r in report["history"] if r["stage"] == "small" and "compress/reassigned" in r]
    assert history and any(r["compress/reassigned"] > 0 for r in history)


@pytest.mark.long
def test_the_dry_run_shows_bits_and_predicted_sizes(finished, capsys):
    folder, _ = finished
    assert main(["recipe", str(folder / "recipe.yaml"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "3-bit palettization (sensitive k-means)" in said and "Palettized weights" in said
    assert "3-bit palettization (sensitive k-means, tables trained)" in said


@pytest.mark.long
def test_a_stopped_training_of_tables_continues_to_the_same_model(finished, tmp_path, monkeypatch):
    folder, report = finished
    changed = json.loads(json.dumps(described(folder)))
    changed["output"]["dir"] = str(tmp_path / "run")
    path = tiny.write(changed, tmp_path / "recipe.yaml")
    train_phase, steps = stages.training.train_phase, []

    def stopping(*args, phase, stop, **kwargs):
        def ninth_step():
            steps.append(phase.stage)
            return steps.count("small") == 9

        return train_phase(*args, phase=phase, stop=ninth_step, **kwargs)

    monkeypatch.setattr(stages.training, "train_phase", stopping)
    with pytest.raises((KeyboardInterrupt, Stopped)):
        run(load(path))
    assert list((tmp_path / "run" / "stages" / "small").glob("*/checkpoint-*"))
    again = run(load(path))
    first, second = (
        records.of(artifact.load(root / r["checkpoints"]["small"]))
        for root, r in ((folder / "run", report), (tmp_path / "run", again))
    )
    assert set(first) == set(second)
    for name, record in first.items():
        assert torch.equal(record.lut, second[name].lut) and torch.equal(record.indices, second[name].indices)


def refused(folder, **changes):
    stage = {"id": "p", "palettize": {"method": "kmeans"}} | changes
    dense = {"id": "dense", "train": {"epochs": 1, "lr": 1e-3}}
    path = tiny.write(
        described(folder, stages=[dense, stage], export=[{"id": "ov", "format": "openvino", "of": ["p"]}]),
        folder / "r.yaml",
    )
    with pytest.raises(RecipeError) as error:
        load(path)
    return str(error.value)


def test_recipes_that_make_no_sense_are_errors(tmp_path):
    assert "palettize.finetune needs train" in refused(tmp_path, palettize={"method": "skm", "finetune": {}})
    assert "give quantize or palettize" in refused(tmp_path, quantize={"mode": "ptq"})
    assert "palettize.bits" in refused(tmp_path, palettize={"method": "kmeans", "bits": 9})
    assert "method" in refused(tmp_path, palettize={"method": "k-means"})
    assert "group_sise" in refused(tmp_path, palettize={"method": "kmeans", "group_sise": 4})


def test_tables_do_not_train_with_split_masters(tmp_path):
    found = described(tmp_path, precision="bf16-split")
    with pytest.raises(RecipeError, match="table entries stand in the compute weights"):
        load(tiny.write(found, tmp_path / "r.yaml"))


def test_a_stage_after_a_palettized_one_must_not_undo_it(tmp_path):
    found = described(tmp_path)
    found["stages"] = [*found["stages"][:2], {"id": "more", "train": {"epochs": 1, "lr": 1e-3}}]
    found["export"][0]["of"] = ["more"]
    with pytest.raises(RecipeError, match="'skm' holds compressed weights, which nothing may change after"):
        load(tiny.write(found, tmp_path / "r.yaml"))


def test_a_budget_shows_its_bits_in_report_and_dry_run(tmp_path, capsys):
    tables = {"method": "skm", "granularity": "tensor", "size_budget": 3.5}
    recipe = described(tmp_path, stages=[{"id": "mixed", "from": "model", "palettize": tables}])
    recipe["export"][0]["of"] = ["mixed"]
    path = tiny.write(recipe, tmp_path / "recipe.yaml")
    report = run(load(path))
    rows = report["compressed"]["mixed"]
    assert len({row["bits"] for row in rows}) > 1
    assert 2.5 < 8 * sum(r["bytes"] for r in rows) / sum(r["count"] for r in rows) <= 3.5
    text = (tmp_path / "run" / "report.md").read_text()
    words = "mixed-bit palettization (sensitive k-means, at most 3.5 bits a weight)"
    assert methods(report, "mixed") == [words]
    assert all(f"{row['bits']:g} bits" in text for row in rows)
    assert main(["recipe", str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert words in said and "by sensitivity" in said
