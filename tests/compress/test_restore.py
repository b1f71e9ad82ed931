import math

import numpy as np
import pytest
import torch
from torch import nn

from mptrain.compress.base import Site, Tools
from mptrain.compress.quantize import quantizers, restore
from mptrain.compress.quantize.methods import Quantization
from mptrain.compress.quantize.operations import recorded
from mptrain.compress.quantize.units import units
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
    quantized = {m for unit in units(q, batches()[0]) for m in unit.scopes}
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
    ranked = restore.rank(whole, batches(), restore.outputs(model, batches()))
    assert ranked[0].scopes == ("layers.3",) and len(ranked) == LAYERS
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
    assert [unit.scopes for unit in units(q, batches()[0])] == [("q", "k"), ("out",)]


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
    first = restore.rank(quantized, inputs, restore.outputs(model, inputs))[0]
    assert first.scopes == ("gem",)
    plain = quantizers.quantize(model, Ptq(mode="ptq"), inputs)
    assert "gem" not in {name for unit in units(plain, inputs[0]) for name in unit.scopes}


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


def test_a_sum_beside_all_layers_is_an_operation_of_its_own():
    config = Ptq.model_validate({"mode": "ptq", "scheme": "convolutional"})
    model = Wrapped().eval()
    quantized = quantizers.quantize(model, config, batches())
    found = units(quantized, batches()[0])
    reads_x = ("module.one", "module.two", "module/mul/0")
    assert [unit.scopes for unit in found] == [("module/add/0",), reads_x]
    named = quantizers.quantize(model, config.model_copy(update={"ignore": ["module/add/0"]}), batches())
    assert [unit.scopes for unit in units(named, batches()[0])] == [reads_x]


# -- single operations


class Repeated(nn.Module):
    """What a GeM is, with names that repeat: of two powers in a row one alone is hard to quantize."""

    def __init__(self):
        super().__init__()
        self.first, self.pool, self.last = nn.Linear(WIDTH, WIDTH), Powers(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return {"logits": self.last(self.pool(self.first(x)))}


class Powers(nn.Module):
    def forward(self, x):
        wide = (x.abs() + 0.1).pow(0.5).pow(2.0).pow(6.0)  # decades apart, of which one scale keeps the largest
        return wide.pow(1 / 6) * x.sign()


CONVOLUTIONAL = Ptq.model_validate({"mode": "ptq", "scheme": "convolutional"})


def test_operations_have_one_name_with_and_without_quantizers():
    model = Repeated().eval()
    plain = recorded(model, batches()[0])
    assert [s for s in plain.scopes.values() if s.startswith("pool/")] == [
        "pool/abs/0", "pool/add/0", "pool/pow/0", "pool/pow/1", "pool/pow/2", "pool/pow/3", "pool/sign/0", "pool/mul/0"
    ]  # fmt: skip
    assert plain.scopes == recorded(quantizers.quantize(model, CONVOLUTIONAL, batches()), batches()[0]).scopes


@torch.no_grad()
def near(model):
    """A share of rows that are within 10% of the float model's."""
    (batch,) = batches(1)
    right, found = (m(**batch)["logits"] for m in (repeated(), model))
    return Score("near", ((found - right).norm(dim=1) < 0.1 * right.norm(dim=1)).double().numpy()[:, None], MEAN)


def repeated():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Repeated().eval()


def test_of_a_layer_with_several_operations_the_fewest_are_found():
    """Of the pool, the one that reads the sixth power: all else in it may be int8."""
    model, method = repeated(), Quantization(CONVOLUTIONAL.model_copy(update={"ignore": "auto", "max_drop": 0.05}))
    q = method.finalize(method.prepare(model, Tools(inputs=batches, score=near)), Tools())
    found = method.facts()["restored"]
    assert found["ignore"] == ["pool/pow/3"] and found["int8"] < 0.5 and found["drop"] <= 0.05
    quantized = {scope for unit in units(q, batches()[0]) for part in unit.parts for scope in part.scopes}
    assert quantized == {"first", "last", "pool/pow/0", "pool/pow/1", "pool/pow/2", "pool/mul/0"}
    assert quantizers.left_in_float(q) == {"modules": [], "operations": {"pool/pow/3": 4}}


def test_the_float_model_is_run_once_on_what_units_are_ranked_by():
    """Layers are ranked, then the operations in them; calibration and the names of operations do not count."""
    model, inputs, calls = repeated(), batches(), []

    def quantized(ignore):
        hook.remove()
        try:
            return quantizers.quantize(model, CONVOLUTIONAL.model_copy(update={"ignore": ignore}), inputs)
        finally:
            count()

    def count():
        nonlocal hook
        hook = model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs["x"]), with_kwargs=True)

    hook = model.register_forward_pre_hook(lambda *_: None)
    found = restore.search(model, quantized, inputs, near, 0.05)
    hook.remove()
    assert found["ignore"] == ["pool/pow/3"]
    assert sum(x is inputs[1]["x"] for x in calls) == 1


def test_what_was_left_in_float_is_saved_with_the_quantizers():
    q = quantizers.quantize(repeated(), CONVOLUTIONAL.model_copy(update={"ignore": ["pool/pow", "last"]}), batches())
    again = quantizers.attach(repeated(), quantizers.config_of(q))
    assert quantizers.left_in_float(again) == quantizers.left_in_float(q) == {
        "modules": ["last"], "operations": {f"pool/pow/{n}": 4 for n in range(4)}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("pool/powr", r"'pool/powr' matches no operation\. pool runs pool/abs/0, pool/add/0, pool/pow/0"),
        ("pool/pow/4", r"'pool/pow/4' matches no operation\. pool runs"),
        ("pol/pow/3", r"'pol/pow/3': no module is called 'pol'\. Did you mean 'pool'"),
        ("re:pool/[", r"is not a regular expression"),
        ("re:pool/xyz", r"'re:pool/xyz' matches no operation"),
    ],
)
def test_an_operation_that_is_not_there_is_said_with_those_that_are(pattern, said):
    config = CONVOLUTIONAL.model_copy(update={"ignore": [pattern]})
    at_once = pattern.startswith("pol/")  # the others need a forward pass
    does = (
        (lambda: Quantization.check(config, Repeated(), Site("quantize")))
        if at_once
        else (lambda: quantizers.quantize(repeated(), config, batches()))
    )
    with pytest.raises(UserError, match=rf"^quantize\.ignore: .*{said}"):
        does()
