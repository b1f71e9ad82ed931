"""The work that a prediction counts is the work that is done."""

import pytest
import torch
from kit.long import except_for
from kit.tiny_models import inputs, tiny
from torch.utils.flop_counter import FlopCounterMode

from mptrain.compress.weights import times, weight_only
from mptrain.recipe import WeightOnly


@pytest.mark.parametrize("family", except_for(["opt", "llama", "bert"], ["llama"]))
@pytest.mark.parametrize("method", ["gptq", "scale"])
def test_multiply_adds_are_those_of_the_calibration_within_a_factor_of_two(family, method):
    config = WeightOnly(mode="weight_only", method=method, block_size=16)
    batches = [inputs(family, batch=8, seed=seed) for seed in range(4)]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    model = tiny(family)
    with FlopCounterMode(display=False) as counter:
        weight_only.compress(model, config, batches)
    # what GPTQ itself multiplies is counted by the column and weight, not here
    rounding = tiny(family)
    counted = counter.get_total_flops() / 2 - sum(
        _own(choice, rounding, name) for name, choice in plan(rounding, config)
    )
    assert 0.5 < times.work(tiny(family), config, tokens).macs / counted < 2


def plan(model, config):
    return weight_only.choices(model, config).items()


def _own(choice, model, name):
    """Updates of later columns in gptq: a product at the end of each panel."""
    if choice.method != "gptq" or choice.layer is None:
        return 0
    rows, columns = model.get_parameter(name).shape
    panel = 128 // 16 * 16
    return sum(rows * min(panel, columns - s) * max(0, columns - s - panel) for s in range(0, columns, panel))


def test_columns_and_weights_are_those_of_the_plan():
    config = WeightOnly(mode="weight_only", method="gptq", block_size=16)
    with torch.device("meta"):
        model = tiny("llama").to("meta")
    found = times.work(model, config, 0)
    chosen = weight_only.choices(model, config)
    gptq = [name for name, choice in chosen.items() if choice.layer]  # a look-up table has no inputs to weigh errors
    assert found.macs == 0 and set(found.weights) == {"gptq", "scale"}
    assert found.weights["gptq"] == sum(model.get_parameter(name).numel() for name in gptq)
    assert found.columns["gptq"] == sum(model.get_parameter(name).shape[1] for name in gptq)
    assert times.work(model, config.model_copy(update={"method": "rtn"}), 100).macs == 0


def test_a_prediction_grows_with_tokens_and_slower_machines():
    config, model = WeightOnly(mode="weight_only", method="gptq", block_size=16), tiny("opt")
    base = times.predicted_seconds(model, config, 0, 1e6)
    assert base > 0
    few, many = (times.work(model, config, tokens).macs for tokens in (1000, 3000))
    assert many == 3 * few > 0
