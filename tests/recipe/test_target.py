"""Which variant a budget in time or bytes counts."""

from __future__ import annotations

import pytest
from kit import bare
from kit.bare import TRAIN

from mptrain.core.errors import RecipeError
from mptrain.recipe.target import target

PRUNED = {"id": "p", "train": TRAIN, "prune": {"method": "magnitude", "keep": {"latency": 0.5}}}
PTQ = {"id": "q", "quantize": {"mode": "ptq"}}
INT4 = {"id": "w", "quantize": {"mode": "weight_only", "method": "rtn", "block_size": "auto"}}


def recipe(*stages, export=("openvino", "p"), **changes):
    exports = [{"id": f"e{i}", "format": export[i], "of": [export[i + 1]]} for i in range(0, len(export), 2)]
    more = {"export": exports, "evaluate": {"latency": {"threads": ["all", 1]}}}
    return bare.recipe(*stages, **{**more, **changes})


def found(*stages, **changes):
    checked = recipe(*stages, **changes)
    return target(checked, checked.stage("p"))


def test_a_float_stage():
    counted = found(PRUNED)
    assert (counted.export.format, counted.precision, counted.quantize) == ("openvino", "fp32", None)
    assert counted.threads == "all" and counted.bytes == (4.0, 4.0)
    assert counted.export.of == [] and counted.export.id == "openvino"


def test_a_stage_that_quantizes():
    counted = found({**PRUNED, "quantize": {"mode": "qat"}})
    assert counted.precision == "int8" and counted.quantize.mode == "qat"
    counted = found({**PRUNED, "quantize": {"mode": "qat", "embeddings": "fp32"}})
    assert counted.bytes == (1.0, 4.0)


def test_a_later_stage_that_quantizes():
    assert found(PRUNED, PTQ, export=("openvino", "p", "onnx", "q")).export.format == "onnx"
    counted = found(PRUNED, PTQ, export=("openvino", "p", "openvino", "q"))
    assert counted.precision == "int8" and counted.quantize.mode == "ptq" and counted.bytes == (1.0, 1.0)
    assert found(PRUNED, {**PTQ, "from": "a"}, export=("openvino", "p", "openvino", "q")).quantize is None


def test_where_nothing_runs_here_openvino_stands_in():
    assert found(PRUNED, export=("coreml", "p")).export.format == "openvino"
    counted = found({**PRUNED, "quantize": {"mode": "qat"}}, export=("coreml", "p"))
    assert (counted.export.format, counted.precision) == ("openvino", "int8")
    assert found(PRUNED, export=("openvino", "a")).export.format == "openvino"


def test_the_size_of_integers_and_tables_is_refused():
    size = {"id": "p", "prune": {"method": "magnitude", "keep": {"size": 0.5}}}
    assert found(PRUNED, INT4, export=("openvino", "w")).precision == "fp32"
    with pytest.raises(RecipeError, match=r"stages\.p\.prune\.keep\.size.*w_compressed stores weights as integers"):
        found(size, INT4, export=("openvino", "w"))
    assert found(size, INT4, export=("openvino", "w", "openvino", "p")).precision == "fp32"
