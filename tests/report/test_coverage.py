"""The report says what a weight method left in floating point."""

import pytest
from kit.tiny_models import tiny

from mptrain.compress.base import Tools
from mptrain.compress.weights.methods import WeightOnlyQuantization
from mptrain.compress.weights.records import of
from mptrain.recipe import WeightOnly
from mptrain.report.tables import models


def test_the_table_of_compressed_weights_says_what_is_left():
    row = {"weight": "a.weight", "bits": 4.0, "how": "blocks of 32", "count": 1_000_000, "bytes": 562_500}
    left = {"Fused.experts": 0.4, "LayerNorm.weight": 0.0001}
    facts = {"quantize": {"coverage": {"covered": 0.5999, "left": left}}, "prune": {}}
    report = {"compressed": {"q": [row]}, "methods": {"q": {"facts": facts}, "dense": {"facts": {}}}}
    note = models.compressed(report).note
    assert note.endswith("q: 60.0% of the parameters; left in floating point: Fused.experts 40.0%.")
    assert "left" not in models.compressed({"compressed": {"q": [row]}}).note


def test_a_method_states_its_share():
    model = tiny("gpt2")
    method = WeightOnlyQuantization(WeightOnly(mode="weight_only", method="rtn"))
    method.finalize(model, Tools())
    coverage = method.facts()["coverage"]
    total = sum(p.numel() for p in model.parameters())
    covered = {id(model.get_parameter(name)): model.get_parameter(name).numel() for name in of(model)}
    assert coverage["covered"] == pytest.approx(sum(covered.values()) / total)
    assert set(coverage["left"]) == {"LayerNorm.weight", "LayerNorm.bias", "Conv1D.bias"}
