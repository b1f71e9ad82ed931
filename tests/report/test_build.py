"""report.json: the keys, the arithmetic, and that it is JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf, nan
from typing import Any

import numpy as np
import pytest
from kit import report_sample as sample

from mptrain.data.tasks.metrics import EXP_RATIO, MEAN, Score
from mptrain.measure.intervals import interval, paired_difference
from mptrain.report.build import SCHEMA
from mptrain.report.recommend import main_setting


def strict(report: dict[str, Any]) -> dict[str, Any]:
    def refuse(text: str) -> float:
        raise AssertionError(f"{text} is not JSON")

    return json.loads(json.dumps(report, allow_nan=False), parse_constant=refuse)


@pytest.fixture(scope="module")
def report():
    return sample.report()


def test_keys_and_plain_types(report):
    keys = ["schema", "host", "versions", "recipe", "wall_s", "variants", "comparisons", "structure", "gates"]
    assert report["schema"] == SCHEMA == "mptrain.report/v1"
    assert set(keys) <= set(report)
    assert strict(report) == report
    assert report["recipe"]["schema"] == "mptrain/v1"
    row = report["variants"][0]
    assert {"id", "format", "precision", "metrics", "size_bytes", "params", "latency_ms"} <= set(row)
    assert set(row["metrics"]["accuracy"]) == {"value", "unit", "n", "ci95"}
    assert set(row["latency_ms"]["b1_s128_t1"]) == {"median", "min", "runs"}
    assert set(report["gates"][0]) == {"name", "value", "limit", "passed", "variant"}


def test_comparisons_are_ratios_and_differences_to_the_baseline(report):
    variants = sample.variants()
    base = variants[0]
    assert [c["id"] for c in report["comparisons"]] == [v.id for v in variants[1:]]
    for v, c in zip(variants[1:], report["comparisons"], strict=True):
        difference = paired_difference(v.scores[0], base.scores[0])
        assert c["vs"] == "baseline_fp32"
        assert c["accuracy_delta"] == pytest.approx(v.scores[0].value - base.scores[0].value) == -c["drop"]
        assert c["accuracy_delta_ci95"] == [difference.low, difference.high]
        assert c["size_ratio"] == base.size_bytes / v.size_bytes
        key = "b1_s128_t1"
        assert c["speedup"][key] == base.latency_ms[key]["median"] / v.latency_ms[key]["median"]
    measured = report["variants"][2]["metrics"]["accuracy"]
    assert measured == {
        "value": variants[2].scores[0].value,
        "unit": "fraction",
        "n": sample.N,
        "ci95": list(interval(variants[2].scores[0])),
    }


def test_floor_has_the_baselines_lead(report):
    lead = paired_difference(sample.variants()[0].scores[0], sample.score(0.76, 9))
    assert report["floor"]["lead"] == {"value": lead.value, "ci95": [lead.low, lead.high], "verdict": "better"}
    other = Score("accuracy", np.ones((5, 1)), MEAN)
    assert sample.report(floor=other)["floor"]["lead"] is None


def test_training_steps_follow_the_stages(report):
    assert report["training"] == [
        {"stage": "dense", "from": "model", "steps": 560, "total_steps": 560},
        {"stage": "jpqd", "from": "dense", "steps": 560, "total_steps": 1120},
    ]


def test_numbers_that_json_lacks_become_null_and_pass_nothing():
    variants = sample.variants()
    broken = Score("accuracy", np.full((sample.N, 1), nan), MEAN)
    variants = [variants[0], *(replace(v, scores=[broken], parity={"max_abs_diff": inf}) for v in variants[1:])]
    report = strict(sample.report(variants=variants, wall_s={"total": np.float32(nan)}))
    measured = {"value": None, "unit": "fraction", "n": sample.N, "ci95": [None, None]}
    assert report["variants"][1]["metrics"]["accuracy"] == measured
    comparison = report["comparisons"][0]
    assert comparison["accuracy_delta"] is comparison["drop"] is comparison["verdict"] is None
    passed = {gate["name"]: gate["passed"] for gate in report["gates"]}
    assert passed == {
        "max_drop": False,
        "min_size_ratio": False,
        "min_speedup.b1_s128_t1": False,
        "parity": False,
        "agreement": False,
        "fused_attention": True,
    }
    assert report["recommendation"]["id"] == "baseline_fp32"
    assert report["wall_s"] == {"total": None}


def perplexity(factor: float) -> Score:
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 60, 100).astype(float)
    losses = tokens * (rng.normal(3, 0.1, 100) + factor)
    return Score("perplexity", np.stack([losses, tokens], 1), EXP_RATIO, "number", False)


def test_perplexity_is_compared_by_its_own_name_and_drops_relatively():
    base, *_, last = sample.variants()
    variants = [replace(base, scores=[perplexity(0)]), replace(last, scores=[perplexity(0.1)])]
    recipe = sample.recipe(model={"path": "packaged:opt", "task": "causal-lm"})
    report = sample.report(recipe=recipe, variants=variants, floor=None)
    comparison = report["comparisons"][0]
    assert comparison["metric"] == "perplexity" and "accuracy_delta" not in comparison
    assert comparison["perplexity_delta"] > 0 and comparison["verdict"] == "worse"
    assert comparison["drop"] == pytest.approx(np.exp(0.1) - 1)
    assert not report["gates"][0]["passed"]


def test_recommends_the_fastest_inside_the_limit(report):
    advice = report["recommendation"]
    assert (advice["id"], advice["setting"], advice["smallest"]) == ("pruned_fp32", "b1_s128_t1", "jpqd_int8_emb4")
    assert set(advice["by_setting"]) == set(report["variants"][0]["latency_ms"])
    assert "fastest" in advice["reason"] and "pruned_fp32" in advice["reason"]
    assert any("no int8 dot products" in text for text in advice["warnings"])
    assert sum("is slower than pruned_fp32" in text for text in advice["warnings"]) == 2


def test_a_fast_variant_outside_the_limit_is_not_recommended():
    variants = sample.variants()
    lost = sample.score(0.2, 3, variants[0].scores[0], disagree=0.2)
    variants[1] = replace(variants[1], scores=[lost])
    advice = sample.report(variants=variants)["recommendation"]
    assert advice["id"] == "jpqd_int8"
    recipe = sample.recipe(gates={})  # without a limit, one that is worse by its interval
    assert sample.report(variants=variants, recipe=recipe)["recommendation"]["id"] == "jpqd_int8"


def test_fast_int8_is_recommended_without_warnings():
    report = sample.report(variants=sample.variants(int8_speed=4.2), host=sample.host(("avx2", "avx512_vnni")))
    assert report["recommendation"]["id"].startswith("jpqd_int8")
    assert report["recommendation"]["warnings"] == []


def test_a_runtime_that_would_be_faster_if_nobody_told_it_is_said():
    """On CPUs with AMX OpenVINO computes fp32 files in bf16: speed-ups over f32 are not those over what a user has."""
    variants = sample.variants(int8_speed=4.2)
    variants[0] = replace(variants[0], runtime={**variants[0].runtime, "left_to_itself": "bf16"})
    said = [text for text in sample.report(variants=variants)["recommendation"]["warnings"] if "Left to itself" in text]
    assert len(said) == 1 and "baseline_fp32 was timed in f32" in said[0] and "dense in fp32 with hint: bf16" in said[0]
    both = replace(variants[0], id="dense_bf16", runtime={"inference_precision": "bf16"})
    faster = replace(
        variants[1], id="pruned_bf16", runtime={"inference_precision": "bf16"}, latency_ms=sample.times(9, 1)
    )
    warnings = sample.report(variants=[*variants, both, faster])["recommendation"]["warnings"]
    assert not any("Left to itself" in text for text in warnings)
    assert any("is slower than pruned_bf16, the same structure in bf16" in text for text in warnings)


def test_slow_variants_leave_the_baseline_recommended():
    variants = [replace(v, latency_ms=sample.times(1.0 if i == 0 else 0.7, 1)) for i, v in enumerate(sample.variants())]
    advice = sample.report(variants=variants)["recommendation"]
    assert advice["id"] == "baseline_fp32" and advice["reason"].startswith("No compressed variant")


def test_where_only_the_baseline_was_timed_nothing_is_recommended():
    variants = [v if i == 0 else replace(v, latency_ms={}) for i, v in enumerate(sample.variants())]
    assert sample.report(variants=variants)["recommendation"] is None


def test_main_setting():
    assert main_setting(["b8_s128_t1", "b1_s32_t1", "b1_s128_tall", "b1_s128_t1"]) == "b1_s128_t1"
    assert main_setting(["b2_t4", "b1_tall", "b1_t2"]) == "b1_t2"


def test_a_run_without_exports_still_has_a_report():
    report = strict(sample.report(variants=[], floor=None, history=[], methods={}))
    assert report["variants"] == report["comparisons"] == report["training"] == []
    assert report["baseline"] is report["metric"] is report["recommendation"] is report["structure"] is None
    assert {gate["name"]: gate["passed"] for gate in report["gates"]}["max_drop"] is False
    assert len(report["notes"]) == 2  # gates with nothing to check are named


def test_hub_names_are_told_from_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = sample.recipe(
        model={"path": "google-bert/bert-base-uncased", "task": "text-classification"}, data={"source": "runs/reviews"}
    )
    assert sample.report(recipe=recipe)["on_hub"] == {"model": True, "data": True}
    (tmp_path / "runs/reviews").mkdir(parents=True)
    assert sample.report(recipe=recipe)["on_hub"] == {"model": True, "data": False}
    assert sample.report()["on_hub"] == {"model": False, "data": False}


def test_a_baseline_that_has_learned_nothing_is_said():
    learned = {"labels": {"test": {"rotten": 1200, "fresh": 1351}}}
    always = {"labels": {"test": {"rotten": 100, "fresh": 2451}}}
    assert not any("learned nothing" in note for note in sample.report(data_facts=learned)["notes"])
    (note,) = [n for n in sample.report(data_facts=always)["notes"] if "learned nothing" in n]
    assert "always answers 'fresh' on 96.1%" in note


def test_without_a_baseline_in_fp32_it_is_the_first_variant_of_that_stage():
    found = [replace(v, id=f"{v.id}_x", precision="fp16") for v in sample.variants()]
    assert sample.report(variants=found[::-1])["baseline"] == "baseline_fp32_x"


def test_int8_variants_say_where_they_compute_other_numbers():
    (note,) = [n for n in sample.report()["notes"] if "16 bits" in n]
    assert note.startswith("jpqd_int8, jpqd_int8_emb4: ") and "quantize.reduce_range: true" in note
    stages = sample.recipe().model_dump(mode="json", by_alias=True)["stages"]
    stages[1]["quantize"]["reduce_range"] = True
    assert not any("16 bits" in n for n in sample.report(recipe=sample.recipe(stages=stages))["notes"])
