"""A language model pruned, distilled and trained through int4 in one stage: what the exported file holds is what the
last step saw."""

import json

import openvino as ov
import pytest
from kit import tiny_tasks

import mptrain
from mptrain.compress.weights import records
from mptrain.core.errors import RecipeError
from mptrain.export.openvino import facts
from mptrain.flow import stage as stages
from mptrain.recipe.file import read
from mptrain.run import run
from mptrain.train.interrupt import Stopped

INT4 = {"mode": "weight_only", "block_size": 16, "finetune": {}}
PRUNE = {"method": "curvature", "keep": {"encoder_params": 0.75}, "round_ffn": 16, "min_ffn": 16}


def described(folder, **changes):
    made = tiny_tasks.recipe("causal-lm", folder)
    made["stages"] = [
        {"id": "dense", "train": {"epochs": 6, "lr": 3e-3, "batch_size": 8}},
        {
            "id": "small",
            "teacher": "dense",
            "prune": PRUNE,
            "train": {"epochs": 1, "lr": 2e-3, "batch_size": 8, "checkpoint_steps": 4},
            "distill": {"weight": 0.7, "temperature": 1.0},
            "quantize": INT4,
        }
        | changes,
    ]
    made["export"] = [{"id": "ov", "format": "openvino", "of": ["dense", "small"], "cache": 32}]
    made["gates"] = {"parity": 1e-4}
    return made


def load(made, folder):
    (folder / "recipe.yaml").write_text(json.dumps(made))
    return read(folder / "recipe.yaml").recipe


def compressed(folder, report):
    return records.of(mptrain.load(folder / "run" / report["checkpoints"]["small"]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int4")
    return folder, run(load(described(folder), folder))


def test_the_file_holds_the_trained_integers_of_the_pruned_model(finished):
    folder, report = finished
    dense, small = report["variants"]
    assert (small["precision"], small["runtime"]["cache"]) == ("compressed", 32)
    assert small["parity"]["max_abs_diff"] < 1e-4 and small["size_bytes"] < dense["size_bytes"]
    found = compressed(folder, report)
    four = [record for record in records.distinct(found).values() if record.bits == 4]
    graph = ov.Core().read_model(next((folder / "run" / "export").glob("small*/*.xml")))
    assert facts.stored_types(graph)["i4"] == sum(record.q.numel() for record in four) / 2
    widths = [found[f"model.layers.{i}.mlp.down_proj.weight"].shape[1] for i in range(2)]
    assert sum(widths) < 128 and all(width % 16 == 0 for width in widths)
    moved = [row["compress/moved"] for row in report["history"] if "compress/moved" in row]
    assert moved and 0 < moved[-1] < 1
    assert {row["weight"] for row in report["compressed"]["small"]} == set(records.distinct(found))
    card = (folder / "run" / "README.md").read_text()
    assert "int4 weights (gptq, per block of 16, trained)" in card and "distillation" in card
    scores = {v["id"]: v["metrics"]["perplexity"]["value"] for v in report["variants"]}
    assert scores["small_ov_compressed"] < 1.3 * scores["baseline_ov_fp32"]


def test_a_stopped_training_continues_to_the_same_integers(finished, tmp_path, monkeypatch):
    folder, report = finished
    changed = described(folder)
    changed["output"]["dir"] = str(tmp_path / "run")
    train_phase, steps = stages.training.train_phase, []

    def stopping(*args, phase, stop, **kwargs):
        def sixth_step():
            steps.append(phase.stage)
            return steps.count("small") == 6

        return train_phase(*args, phase=phase, stop=sixth_step, **kwargs)

    monkeypatch.setattr(stages.training, "train_phase", stopping)
    with pytest.raises((KeyboardInterrupt, Stopped)):
        run(load(changed, tmp_path))
    assert list((tmp_path / "run" / "stages" / "small").glob("*/checkpoint-*"))
    again = compressed(tmp_path, run(load(changed, tmp_path)))
    whole = compressed(folder, report)
    assert set(whole) == set(again)
    assert all((whole[name].q == again[name].q).all() for name in whole)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"quantize": INT4 | {"finetune": None}}, "goes in a stage of its own.*finetune: {}"),
        ({"train": None, "distill": None, "teacher": None}, "quantize.finetune needs train"),
        ({"prune": PRUNE | {"round_ffn": 8}}, "prune.round_ffn 16, or block_size: auto"),
        ({"prune": None, "adapters": {"rank": 4}}, "both change the weights in training"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_way_out(tmp_path, changes, problem):
    with pytest.raises(RecipeError, match=f"(?s){problem}"):
        load(described(tmp_path, **changes), tmp_path)


def test_split_masters_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"stages\.small\.quantize\.finetune.*precision\.master fp32"):
        load(described(tmp_path) | {"precision": "bf16-split"}, tmp_path)
