"""`precision:` in a recipe: every stage trains half with fp32 masters, JPQD too, and an interruption changes no bit."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from accelerate import PartialState
from kit import tiny
from safetensors.torch import load_file

from mptrain.core.errors import RecipeError, TrainingError
from mptrain.data.load import load_data
from mptrain.flow import stage
from mptrain.flow.stage_inputs import inputs_of
from mptrain.models.processor import load_processor
from mptrain.recipe import file
from mptrain.recipe.plan import phases
from mptrain.train import phase as training
from mptrain.train.interrupt import Stopped

MOVEMENT = {"method": "movement", "score": "shared", "keep": {"encoder_params": 0.5}, "schedule": {"end": 1}}
JPQD = {
    "dense": {"epochs": 1, "lr": 3e-3, "batch_size": 8, "checkpoint_steps": 7, "log_steps": 1},
    "jpqd": {"epochs": 1.5, "lr": 2e-3, "batch_size": 8, "checkpoint_steps": 5, "log_steps": 1},
}


def recipe(folder, precision, **jpqd):
    described = tiny.jpqd(folder)
    for one in described["stages"]:
        one["train"] = JPQD[one["id"]]
    described["stages"][1] |= jpqd
    return described | {"precision": precision}


def run(folder, described, name, stop_at=None, monkeypatch=None):
    """Runs all phases as `mptrain recipe` does, without exports; stops once, at a call of `stop`, if asked to."""
    checked = file.validate(described, "recipe.yaml")
    processor = load_processor(checked.model, False)
    data = load_data(checked.data, checked.model.task, processor, seed=checked.seed)
    plan = {s.id: phases(s, len(data.train), 1) for s in checked.stages}
    context = stage.Context(inputs_of(checked), data, processor, folder / name, plan, PartialState(cpu=True), False)
    calls = iter(range(10_000))

    @contextlib.contextmanager
    def graceful(_peers):
        yield lambda: next(calls) == stop_at

    monkeypatch.setattr(stage, "_graceful_stop", graceful)
    stopped, rows = 0, []
    for phase in [p for s in checked.stages for p in plan[s.id]]:
        while True:
            try:
                rows += stage.run_phase(context, phase)["history"]
                break
            except Stopped:
                stopped += 1
    assert stopped == (stop_at is not None)
    return {p.name: [load_file(f) for f in sorted((folder / name / p.folder / "model").glob("*.safetensors"))]
            for s in checked.stages for p in plan[s.id]}, rows  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "jpqd", "stop_at"),
    [
        pytest.param({"compute": "fp16", "loss_scale": {"init": 2.0**24}}, {}, 24, marks=pytest.mark.long),
        pytest.param("bf16-master", {"prune": MOVEMENT}, 40, marks=pytest.mark.long),
        pytest.param("bf16-split", {"prune": None}, 27, marks=pytest.mark.long),
        pytest.param("bf16-split-int8", {"prune": None}, 27, marks=pytest.mark.long),
    ],
    ids=["fisher-qat-fp16", "movement-qat-bf16", "qat-split", "qat-split-int8"],
)
def test_stages_train_half_and_an_interruption_changes_no_bit(tmp_path, monkeypatch, precision, jpqd, stop_at):
    described = recipe(tmp_path, precision, **jpqd)
    models, rows = run(tmp_path, described, "whole", None, monkeypatch)
    again, rows_again = run(tmp_path, described, "stopped", stop_at, monkeypatch)
    assert models.keys() == again.keys()
    for name, files in models.items():
        for a, b in zip(files, again[name], strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[k], b[k]) for k in a), name
            assert {t.dtype for t in a.values()} <= {torch.float32, torch.int64}
    losses = [r for r in rows if "loss" in r]
    assert losses == [r for r in rows_again if "loss" in r]
    assert all("precision/loss_scale" in r and json.dumps(r["loss"]) != "NaN" for r in losses)
    skipped = [r["precision/skipped_steps"] for r in losses]
    assert (max(skipped) > 3) is isinstance(precision, dict)
    config = json.loads(next((tmp_path / "whole" / "stages").rglob("model/config.json")).read_text())
    assert config["dtype"] == "float32"
    if jpqd.get("prune", True):
        assert max(r.get("compress/sparsity", 0) for r in rows) == pytest.approx(0.5, abs=0.15)
        assert models["finetune"][0].keys() >= models["train"][0].keys()
    evaluated = [r["eval/accuracy"] for r in rows if "eval/accuracy" in r]
    assert len(evaluated) >= 2


def test_a_stage_that_overflows_for_good_ends_with_its_place_and_the_diagnosis(tmp_path, monkeypatch):
    compute_loss = training.PhaseTrainer.compute_loss
    monkeypatch.setattr(training.PhaseTrainer, "compute_loss", lambda *a, **k: compute_loss(*a, **k) * float("nan"))
    scale = {"init": 2, "floor": 2, "ceiling": 2, "interval": None, "patience": 3}
    described = recipe(tmp_path, {"compute": "fp16", "loss_scale": scale})
    with pytest.raises(TrainingError, match="In stage dense, phase train, step 2: 3 optimizer steps in a row were"):
        run(tmp_path, described, "run", None, monkeypatch)


def test_moments_of_8_bits_are_a_name_and_a_field_and_need_split_masters(tmp_path):
    named = file.validate(recipe(tmp_path, "bf16-split-int8", prune=None), "recipe.yaml").precision
    mapping = {"compute": "bf16", "master": "split", "moments": "int8"}
    assert named == file.validate(recipe(tmp_path, mapping, prune=None), "recipe.yaml").precision
    assert (named.compute, named.master, named.moments) == ("bf16", "split", "int8")
    of_before = file.validate(recipe(tmp_path, "bf16-split", prune=None), "recipe.yaml").precision
    assert "moments" not in of_before.model_dump() and named.model_dump()["moments"] == "int8", "runs go on as they are"
    for master, compute in (("fp32", "bf16"), ("fp32", "fp32")):
        wrong = {"compute": compute, "master": master, "moments": "int8"}
        with pytest.raises(RecipeError, match=r"precision: moments int8 need master split .*write master: split"):
            file.validate(recipe(tmp_path, wrong, prune=None), "recipe.yaml")


def test_split_masters_and_masks_exclude_each_other(tmp_path):
    with pytest.raises(RecipeError, match=r"masks act on the compute weights"):
        file.validate(recipe(tmp_path, "bf16-split"), "recipe.yaml")
