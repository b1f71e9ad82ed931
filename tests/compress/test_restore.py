import math

import numpy as np
import pytest
import torch
from torch import nn

from mptrain.compress.base import Tools
from mptrain.compress.quantize import placement, quantizers, restore
from mptrain.compress.quantize.methods import Quantization
from mptrain.core.errors import NotFinite, UserError
from mptrain.data.sources import cnn
from mptrain.data.tasks.metrics import MEAN, Score
from mptrain.recipe import Ptq

LAYERS, WIDTH = 8, 16


class Chain(nn.Module):
    """Linear layers with residuals; inputs of those in `loud` have one channel of no use that is very large."""

    def __init__(self, loud):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        for index, layer in enumerate(self.layers):
            layer.weight.data = torch.randn(WIDTH, WIDTH, generator=draw) / 4
            layer.weight.data[:, 0] = 0
            layer.bias.data.zero_()
            layer.register_buffer("gain", torch.ones(WIDTH))
            if index in loud:
                layer.gain[0] = 3e3

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x * layer.gain).tanh()
        return {"logits": x}


def batches(count=2):
    return [{"x": torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(i))} for i in range(count)]


def scored(loud):
    """Whether the same of 16 classes is chosen as by the float model."""
    batch, reference = batches(5)[-1], Chain(loud)

    @torch.no_grad()
    def score(model):
        right, found = (m(**batch)["logits"].argmax(-1) for m in (reference, model))
        return Score("same", np.array(found == right, dtype=np.float64)[:, None], MEAN)

    return score


def config(**changed):
    return Ptq.model_validate({"mode": "ptq", "smooth_quant": False, "ignore": "auto", **changed})


def searched(loud, **changed):
    model, method = Chain(loud), Quantization(config(**changed))
    q = method.finalize(method.prepare(model, Tools(inputs=batches, score=scored(loud))), Tools())
    return model, q, method.facts().get("restored")


@pytest.mark.parametrize("loud", [{2}, {1, 6}])
def test_the_layers_that_lose_the_score_are_found_and_no_others(loud):
    model, q, found = searched(loud, max_drop=0.05)
    assert sorted(found["ignore"]) == [f"layers.{i}" for i in sorted(loud)]
    assert found["float"] == 1 and found["int8"] < 0.8 and 1 - found["found"] == found["drop"] <= 0.05
    assert found["units"] == LAYERS and found["evaluations"] <= 2 * math.log2(LAYERS) + 2
    named = quantizers.quantize(model, config(ignore=found["ignore"]), batches())
    again = named.state_dict()
    assert q.state_dict().keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in q.state_dict().items()), "as a recipe that names them"
    quantized = {m for unit in placement.units(q, batches()[0]) for m in unit.modules}
    assert quantized == {f"layers.{i}" for i in range(LAYERS)} - set(found["ignore"])


def test_outputs_that_are_not_finite_lose_more_than_any_limit():
    loud = {2}
    own, model, method = scored(loud), Chain(loud), Quantization(config(max_drop=0.05))

    def score(candidate):
        found = own(candidate)
        if found.value < 0.8:
            raise NotFinite("a division by what was rounded to zero")
        return found

    method.finalize(method.prepare(model, Tools(inputs=batches, score=score)), Tools())
    found = method.facts()["restored"]
    assert found["ignore"] == ["layers.2"] and found["int8"] is None and found["drop"] <= 0.05


def test_what_loses_nothing_stays_whole():
    _, _, found = searched(set(), max_drop=0.05)
    assert found["ignore"] == [] and found["evaluations"] == 1 and found["drop"] <= 0.05


def test_the_order_is_that_of_the_errors():
    model = Chain({3})
    whole = quantizers.quantize(model, config(ignore=[]), batches())
    ranked = restore.rank(model, whole, batches())
    assert ranked[0].modules == ("layers.3",) and len(ranked) == LAYERS
    before = scored({3})(whole).value
    assert before < 1 and scored({3})(whole).value == before, "everything is quantized again"


def test_layers_that_read_one_tensor_are_a_unit():
    class Shares(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x):
            return {"logits": self.out(self.q(x).tanh() * self.k(x).tanh())}

    q = quantizers.quantize(Shares(), config(ignore=[]), batches())
    assert [unit.modules for unit in placement.units(q, batches()[0])] == [("q", "k"), ("out",)]


def test_a_limit_that_nothing_meets_is_said():
    with pytest.raises(UserError, match=r"quantize\.max_drop: 1e-09 is not met unless all layers stay in float"):
        searched(set(range(LAYERS)), max_drop=1e-9)


def test_a_name_that_means_others_too_becomes_an_expression():
    names = ["", "a", "a.b", "b", "c"]
    assert restore.patterns(["c", "b"], names) == ["c", "re:^b$"]


def test_without_a_task_it_is_refused():
    method = Quantization(config())
    with pytest.raises(UserError, match="auto needs the score of a task"):
        method.prepare(Chain(set()), Tools(inputs=batches))


def test_the_limit_goes_with_auto():
    assert config().limit == 0.002 and config(ignore=["a"]).limit is None
    with pytest.raises(ValueError, match="max_drop: is for ignore: auto"):
        config(ignore=["a"], max_drop=0.1)


def test_of_a_convolutional_scheme_the_pooling_that_int8_breaks_is_found():
    """GeM's x^p spans decades, most of which one scale to a tensor loses; what is around it does not matter."""
    torch.manual_seed(0)
    model = cnn.descriptors(width=4, size=8, power=6.0).eval()
    inputs = [{"pixel_values": torch.randn(16, 3, 12, 12) * 3} for _ in range(2)]
    config = Ptq.model_validate({"mode": "ptq", "scheme": "convolutional"})
    quantized = quantizers.quantize(model, config, inputs)
    first = restore.rank(model, quantized, inputs)[0]
    assert first.modules == ("gem",)
    plain = quantizers.quantize(model, Ptq(mode="ptq"), inputs)
    assert "gem" not in {name for unit in placement.units(plain, inputs[0]) for name in unit.modules}


class Wrapped(nn.Module):
    """A model of one child, in whose forward, outside of layers, is a sum."""

    def __init__(self):
        super().__init__()
        self.module = Sum()

    def forward(self, x):
        return {"logits": self.module(x)}


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return (self.one(x).relu() + self.two(x).relu()) * x


def test_a_sum_beside_all_layers_has_no_name_that_leaves_it_alone():
    config = Ptq.model_validate({"mode": "ptq", "scheme": "convolutional"})
    quantized = quantizers.quantize(Wrapped().eval(), config, batches())
    names = {name for unit in placement.units(quantized, batches()[0]) for name in unit.modules}
    assert {"module.one", "module.two"} >= names and "module" not in names
