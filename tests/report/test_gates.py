"""Gates: which variant counts, and that nothing unmeasured passes."""

from __future__ import annotations

from typing import Any

import pytest

from mptrain.recipe import Gates
from mptrain.report.gates import check, missed

KEY = "b1_s128_t1"


def comparison(name: str, drop: float | None, size: float = 5.0, speed: float | None = 2.0) -> dict[str, Any]:
    return {"id": name, "drop": drop, "size_ratio": size, "speedup": {} if speed is None else {KEY: speed}}


def variant(name: str, precision: str = "fp32", **facts: Any) -> dict[str, Any]:
    row = {"id": name, "precision": precision, "format": "openvino", "parity": None, "runtime": {}}
    return {**row, **facts}


def run(gates: dict[str, Any], variants=(), comparisons=(), layers: int | None = None) -> dict[str, dict[str, Any]]:
    off = {"parity": None, "agreement": None, "fused_attention": None}
    return {row["name"]: row for row in check(Gates(**{**off, **gates}), variants, comparisons, layers)}


def test_max_drop_is_that_of_the_best_variant():
    rows = [comparison("a", 0.03), comparison("b", 0.008), comparison("c", None)]
    gate = run({"max_drop": 0.01}, comparisons=rows)["max_drop"]
    assert gate == {"name": "max_drop", "value": 0.008, "limit": 0.01, "passed": True, "variant": "b"}
    assert not run({"max_drop": 0.005}, comparisons=rows)["max_drop"]["passed"]


@pytest.mark.parametrize("rows", [[], [comparison("a", None)]])
def test_a_drop_that_is_unknown_never_passes(rows):
    gate = run({"max_drop": 1.0, "min_size_ratio": 1.0}, comparisons=rows)
    for name in ("max_drop", "min_size_ratio"):
        assert (gate[name]["value"], gate[name]["passed"], gate[name]["variant"]) == (None, False, None)


def test_size_and_speed_count_only_inside_the_drop():
    rows = [comparison("good", 0.01, size=4.0, speed=1.5), comparison("lost", 0.2, size=20.0, speed=9.0)]
    gates = {"max_drop": 0.01, "min_size_ratio": 5.24, "min_speedup": {KEY: 1.4}}
    found = run(gates, comparisons=rows)
    assert (found["min_size_ratio"]["value"], found["min_size_ratio"]["passed"]) == (4.0, False)
    assert found["min_size_ratio"]["not_counted"] == {"variant": "lost", "value": 20.0, "drop": 0.2}
    assert missed(found["min_size_ratio"]) == (
        "gate min_size_ratio missed: 4.0 against a limit of 5.24 (lost has 20, but its drop of 0.2 is above max_drop)"
    )
    speed = found[f"min_speedup.{KEY}"]
    assert "not_counted" not in speed
    assert (speed["value"], speed["variant"], speed["passed"]) == (1.5, "good", True)
    without = run({"min_size_ratio": 5.24}, comparisons=rows)["min_size_ratio"]
    assert (without["value"], without["variant"], without["passed"]) == (20.0, "lost", True)


def test_size_and_speed_may_come_from_different_variants():
    rows = [comparison("int8", 0.0, size=8.0, speed=0.9), comparison("fp32", 0.0, size=1.4, speed=2.3)]
    found = run({"max_drop": 0.01, "min_size_ratio": 5.24, "min_speedup": {KEY: 1.8}}, comparisons=rows)
    assert [row["variant"] for row in found.values()] == ["fp32", "int8", "fp32"]
    assert all(row["passed"] for row in found.values())


def test_a_setting_that_was_not_measured_fails():
    gate = run({"min_speedup": {"b4_s64_t1": 1.0}}, comparisons=[comparison("a", 0.0)])["min_speedup.b4_s64_t1"]
    assert (gate["value"], gate["passed"]) == (None, False)


def test_parity_is_the_worst_fp32_variant():
    exact = {"max_abs_diff": 1e-6}
    rows = [variant("a", parity=exact), variant("b", parity={"max_abs_diff": 3e-4}), variant("i", "int8")]
    gate = run({"parity": 1e-4}, rows)["parity"]
    assert (gate["value"], gate["variant"], gate["passed"]) == (3e-4, "b", False)
    assert run({"parity": 1e-3}, rows)["parity"]["passed"]
    for missing in (None, {"max_abs_diff": None}):
        gate = run({"parity": 1.0}, [variant("a", parity=exact), variant("b", parity=missing)])["parity"]
        assert (gate["value"], gate["variant"], gate["passed"]) == (None, "b", False)
    assert "parity" not in run({"parity": 1e-4}, [variant("i", "int8")])


def test_parity_is_judged_relative_to_the_outputs():
    found = variant("a", parity={"max_abs_diff": 2e-4, "relative": 1e-5})
    gate = run({"parity": 1e-4}, [found])["parity"]
    assert (gate["value"], gate["passed"]) == (1e-5, True)


def test_agreement_is_that_of_the_worst_quantized_variant():
    rows = [variant("a", parity={"agreement": 0.1})]
    assert "agreement" not in run({"agreement": 0.9}, rows)
    rows += [variant(n, "int8", parity={"agreement": a}) for n, a in (("i", 0.97), ("j", 0.92))]
    gate = run({"agreement": 0.9}, rows)["agreement"]
    assert gate == {"name": "agreement", "value": 0.92, "limit": 0.9, "passed": True, "variant": "j"}
    assert not run({"agreement": 0.95}, rows)["agreement"]["passed"]
    assert not run({"agreement": 0.1}, [*rows, variant("k", "int8", parity=None)])["agreement"]["passed"]


def test_fused_attention_holds_for_every_compiled_variant():
    whole, broken = {"fused_attention": 6, "attention_layers": 6}, {"fused_attention": 0, "attention_layers": 6}
    rows = [variant("a", runtime=whole), variant("b", "int8", runtime=broken)]
    gate = run({"fused_attention": "all"}, rows)["fused_attention"]
    assert (gate["value"], gate["limit"], gate["variant"], gate["passed"]) == (0, 6, "b", False)
    assert run({"fused_attention": "all"}, rows[:1])["fused_attention"]["passed"]
    assert run({"fused_attention": 0}, rows)["fused_attention"]["passed"]
    assert not run({"fused_attention": 1}, rows)["fused_attention"]["passed"]


def test_attention_layers_may_come_from_the_structure():
    rows = [variant("a", runtime={"fused_attention": 6})]
    assert run({"fused_attention": "all"}, rows, layers=6)["fused_attention"]["passed"]
    for layers in (7, None):
        assert not run({"fused_attention": "all"}, rows, layers=layers)["fused_attention"]["passed"]
    assert not run({"fused_attention": "all"}, [variant("a")], layers=6)["fused_attention"]["passed"]
    assert not run({"fused_attention": "all"}, [variant("a", format="coreml")])


def test_casts_are_those_of_the_file_with_the_most():
    rows = [variant("a", "fp16", format="onnx", runtime={"float_casts": 3}), variant("b", runtime={"float_casts": 900})]
    gate = run({"max_casts": 4}, rows)["max_casts"]
    assert (gate["value"], gate["limit"], gate["variant"], gate["passed"]) == (3, 4, "a", True)
    assert not run({"max_casts": 2}, rows)["max_casts"]["passed"]
    assert not run({"max_casts": 9}, [*rows, variant("c", format="onnx")])["max_casts"]["passed"], "not known"
    assert not run({"max_casts": 0}, rows[1:]), "of formats that can tell"


def test_a_bf16_hint_that_became_f32_fails():
    types = {"FullyConnected": {"i8": 12, "bf16": 1}, "Convolution": {"f32": 1}}
    rows = [variant("a", runtime={"layer_precisions": {"FullyConnected": {"bf16": 9}}})]
    assert run({"effective_precision": "bf16"}, rows)["effective_precision.bf16"]["passed"]
    fell = [*rows, variant("b", "int8", runtime={"layer_precisions": types})]
    gate = run({"effective_precision": "bf16"}, fell)["effective_precision.bf16"]
    assert (gate["value"], gate["variant"], gate["passed"]) == (0.0, "b", False), "a type of one layer is not hidden"
    assert not run({"effective_precision": "f32"}, rows)["effective_precision.f32"]["passed"]
    assert not run({"effective_precision": "f32"}, [variant("c")])["effective_precision.f32"]["passed"], "not known"


def test_i8_is_asked_of_quantized_variants():
    floats = variant("a", runtime={"layer_precisions": {"FullyConnected": {"f32": 13}}})
    assert not run({"effective_precision": "i8"}, [floats])
    for found, share in (({"i8": 12}, 1.0), ({"i8": 12, "f32": 4}, 0.75), ({"f32": 2}, 0.0)):
        rows = [floats, variant("b", "int8", runtime={"layer_precisions": {"FullyConnected": found}})]
        gate = run({"effective_precision": "i8"}, rows)["effective_precision.i8"]
        assert (gate["value"], gate["variant"], gate["passed"]) == (share, "b", share == 1.0)
