import pytest
import torch
from kit.tiny_models import inputs, logits, tiny

from mptrain.compress.quantize import quantizers
from mptrain.compress.quantize.fake_quant import FakeQuantizer
from mptrain.compress.quantize.integers import records_from_quantizers, weight_only
from mptrain.compress.weights import records
from mptrain.core.hooks import HOOKS
from mptrain.recipe import Ptq, Qat


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("bert", Qat(mode="qat", bits={"intermediate": 4})),
        ("bert", Qat(mode="qat", weights="asymmetric")),
        ("bert", Ptq(mode="ptq")),
        ("vit", Ptq(mode="ptq", smooth_quant=False)),
    ],
)
def test_the_same_integers_without_quantizers(family, config):
    """Weights equal what the quantizers give, to the bit; without activation quantizers so do the outputs."""
    model = quantizers.quantize(tiny(family), config, [inputs(family, seed=i) for i in range(3)])
    with torch.no_grad():  # as if trained
        for name, parameter in model.named_parameters():
            if HOOKS in name:
                parameter.mul_(1.0137)
    found = records_from_quantizers(model)
    weights = [q for q in model.modules() if isinstance(q, FakeQuantizer) and q.weight_of]
    assert len(weights) == len(found) > 6
    for quantizer in weights:
        name = f"{quantizer.weight_of}.weight"
        with torch.no_grad():
            expected = quantizer(model.get_parameter(name))
        assert torch.equal(found[name].dense().view_as(expected), expected)
        assert found[name].bits == (4 if "intermediate" in name and config.bits else 8)
    plain = weight_only(model)
    assert records.of(plain) == records.distinct(records.of(plain)) and len(records.of(plain)) == len(found)
    bypass_activations(model)
    torch.testing.assert_close(logits(plain, inputs(family)), logits(model, inputs(family)), rtol=0, atol=1e-5)


def test_embeddings_are_rounded_by_row():
    model = quantizers.quantize(tiny("bert"), Qat(mode="qat"), [inputs("bert")])
    names = {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
    plain = weight_only(model, embeddings="int8")
    found = records.of(plain)
    assert set(found) - set(records_from_quantizers(model)) == names
    for name in names:
        error = (found[name].dense() - model.get_parameter(name)).abs()
        assert (error <= found[name].scale * 0.51).all() and found[name].bits == 8
        assert found[name].scale.shape == (len(error), 1)


def bypass_activations(model):
    for module in model.modules():
        if isinstance(module, FakeQuantizer) and module.weight_of is None:
            module.forward = lambda x: x
