"""Every task runs the JPQD recipe: trained, shrunk, quantized, exported, verified, scored and reported."""

import json
from collections import Counter

import numpy as np
import openvino as ov
import optimum.intel as optimum
import pytest
import torch
from kit import tiny, tiny_tasks
from kit.jobs import run

import mptrain
from mptrain.data.load import load_data
from mptrain.models.processor import load_processor
from mptrain.recipe import TASKS
from mptrain.recipe.file import read

OPTIMUM = {n: getattr(optimum, kind.optimum) for n, kind in TASKS.items() if kind.optimum and not kind.causal}


@pytest.mark.long  # test_run runs one task as often as others may break it
@pytest.mark.parametrize("task", [task for task, case in tiny_tasks.CASES.items() if not case.own])
def test_a_task_runs_jpqd_from_training_to_report(task, tmp_path):
    case = tiny_tasks.CASES[task]
    recipe = tiny.write(tiny_tasks.recipe(task, tmp_path), tmp_path / "recipe.yaml")
    run(recipe)
    file = tmp_path / "run" / "report.json"
    report = json.loads(file.read_text())
    check_variants(report, case)
    check_structure(report)
    check_stored_types(report, tmp_path / "run")
    assert {g["name"]: g["passed"] for g in report["gates"]} == {
        "parity": True,
        "agreement": True,
        "fused_attention": True,
    }
    check_exports(report, recipe, tmp_path / "run")

    written = file.read_bytes()
    trained = modified(tmp_path / "run")
    assert "is finished" in run(recipe).stderr
    assert (file.read_bytes(), modified(tmp_path / "run")) == (written, trained)


def check_variants(report, case):
    quantized = [f"jpqd_{p}" for p in case.precision if p != "fp32"]
    assert [v["id"] for v in report["variants"]] == ["baseline_fp32", "pruned_fp32", *quantized]
    for v in report["variants"]:
        assert tuple(v["metrics"]) == case.metrics
        for measured in v["metrics"].values():
            assert measured["n"] == case.n
            assert measured["ci95"][0] <= measured["value"] <= measured["ci95"][1]
        score = v["metrics"][report["metric"]["name"]]["value"]
        better = score > case.learnt if report["metric"]["higher_is_better"] else score < case.learnt
        assert better, f"{v['id']} scores {score}, chance is on the other side of {case.learnt}"
        if v["precision"] == "fp32":
            assert v["parity"]["max_abs_diff"] < 1e-4
        else:
            assert v["parity"]["agreement"] > 0.95
        assert len(v["latency_ms"]) == 1


def check_structure(report):
    layers = report["structure"]["layers"]
    kept, whole = (sum(layer[key] for layer in layers) for key in ("params", "params_total"))
    assert len(layers) == 2
    assert kept <= 0.65 * whole
    params = {v["id"]: v["params"] for v in report["variants"]}
    assert params.pop("baseline_fp32") - whole + kept == params["pruned_fp32"]
    assert set(params.values()) == {params["pruned_fp32"]}


def check_stored_types(report, folder):
    """Constants of the IR as it is on disk: the weights of the encoder are integers where they should be."""
    encoder = sum(layer["params"] for layer in report["structure"]["layers"])
    for v in report["variants"]:
        sizes = Counter()
        for node in ov.Core().read_model(folder / v["path"]).get_ops():
            if node.get_type_name() == "Constant":
                sizes[node.get_element_type().get_type_name()] += node.get_data().size
        if v["precision"] == "fp32":
            assert sizes["i8"] == sizes["i4"] == 0
        else:
            assert sizes["i8"] > 0.9 * encoder, "all but the biases"
            assert (sizes["i4"] > 0) == (v["precision"] == "int8_emb4")


def check_exports(report, recipe, folder):
    """The folder of a variant is all optimum needs, and computes what the checkpoint computes."""
    spec = read(str(recipe)).recipe
    task = spec.model.task
    if task not in OPTIMUM:
        return
    for variant, stage in (("baseline_fp32", "dense"), ("jpqd_int8", "jpqd")):
        exported = folder / "export" / variant
        processor = load_processor(spec.model.model_copy(update={"path": str(exported)}))
        data = load_data(spec.data, task, processor, seed=spec.seed)
        # or OpenVINO computes in bf16 on CPUs that have it
        model = OPTIMUM[task].from_pretrained(exported, ov_config={"INFERENCE_PRECISION_HINT": "f32"})
        trained = mptrain.load(folder / report["checkpoints"][stage])
        assert model.config.id2label == trained.config.id2label
        batch = data.calibration(12, 12)[0]
        with torch.no_grad():
            expected = trained(**batch)
        for name, found in model(**batch).items():
            difference = np.abs(np.asarray(found) - expected[name].numpy())
            assert difference.max() < (1e-4 if stage == "dense" else 0.2 * expected[name].abs().max())


def modified(folder):
    """When each file of the stages and the exports was written."""
    return {p: p.stat().st_mtime_ns for kind in ("stages", "export") for p in (folder / kind).rglob("*")}
