import copy
import functools
import json
import logging
import os
import socket
import warnings

import nncf
import pytest
import torch
from kit.structures import keep
from kit.tiny_models import FAMILIES, inputs, logits, tiny
from nncf.common.logging import nncf_logger, track_progress
from nncf.quantization.algorithms.smooth_quant.algorithm import SmoothQuant
from nncf.torch.quantization import extensions
from torch import nn

from mptrain.compress.adapters.methods import LowRankAdapters
from mptrain.compress.base import Tools
from mptrain.compress.quantize import placement, quantizers
from mptrain.compress.quantize.fake_quant import FakeQuantizer
from mptrain.compress.structure.find import find_structure
from mptrain.compress.structure.shrink import shrink, slices_of
from mptrain.core.errors import ModelError, UserError
from mptrain.core.hooks import HOOKS
from mptrain.core.silence import silenced
from mptrain.recipe import Ptq, Qat
from mptrain.recipe.adapters import Lora


def qat(**options):
    return Qat(mode="qat", **options)


def ptq(**options):
    return Ptq(mode="ptq", **options)


@functools.cache
def _quantized(family, config, options):
    model = tiny(family, **dict(options))
    q = quantizers.quantize(model, config_of_json(config), [inputs(family, seed=i) for i in range(2)])
    return model, q


def config_of_json(text):
    config = json.loads(text)
    return (Qat if config["mode"] == "qat" else Ptq).model_validate(config)


def quantized(family="bert", config=None, **options):
    """(model, quantized copy); made once, to be changed freely."""
    made = _quantized(family, (config or qat()).model_dump_json(), tuple(options.items()))
    return copy.deepcopy(made)


def found(model):
    return [m for m in model.modules() if isinstance(m, FakeQuantizer)]


def weights(model):
    return {q.weight_of: q for q in found(model) if q.weight_of}


def entries(model, kind):
    return [e for e in quantizers.config_of(model)["modules"] if e["kind"] == kind]


# -- placing


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_and_convolution_is_quantized_per_channel(family):
    model, q = quantized(family)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)}
    layers.pop("wav2vec2.encoder.pos_conv_embed.conv", None)  # its weight is computed (weight norm)
    assert weights(q).keys() == layers.keys()
    for name, quantizer in weights(q).items():
        weight = layers[name].weight.detach()
        assert quantizer.levels == (-127, 127)
        expected = weight.flatten(1).abs().amax(1).view(-1, *[1] * (weight.dim() - 1))
        if weight.dim() > 2 and layers[name].in_channels in (1, 3):
            expected *= 2  # NNCF leaves a bit of the first convolution unused: int16 sums overflow without VNNI
        torch.testing.assert_close(quantizer.scale.detach(), expected)
    activations = [quantizer for quantizer in found(q) if not quantizer.weight_of]
    assert activations and all(quantizer.shape == (1,) for quantizer in activations)
    expected, batch = logits(model, inputs(family)), inputs(family)
    error = (logits(q, batch) - expected).abs().max()
    assert 0 < error < 0.25 * expected.abs().max()


@pytest.mark.parametrize("config", [qat(), ptq(), qat(weights="asymmetric")])
def test_a_reduced_range_keeps_sums_of_two_products_in_16_bits(config):
    model, q = quantized("vit", config.model_copy(update={"reduce_range": True}))
    layers = dict(q.named_modules())
    assert weights(q)
    for name, quantizer in weights(q).items():
        low, high = quantizer.levels
        integers = (quantizer(layers[name].weight) / quantizer.grid()[0]).detach()
        assert high - low <= 127 and 2 * 255 * high <= 32767 * (1 if low < 0 else 2)
        assert float(integers.abs().max()) >= 62, "the range is used, also by the first convolution"
    error = (logits(q, inputs("vit")) - logits(model, inputs("vit"))).abs().max()
    assert 0 < error < 0.25 * logits(model, inputs("vit")).abs().max()


def test_placement_and_outputs_are_nncfs():
    model, batches = tiny("bert"), [inputs("bert", seed=i) for i in range(2)]
    ours = quantizers.quantize(
        model, ptq(preset="mixed", fast_bias_correction=True, smooth_quant=False, embeddings="fp32"), batches
    )
    with silenced(), placement._reference_kernels():
        theirs = nncf.quantize(
            model,
            nncf.Dataset(batches),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(types=["scaled_dot_product_attention", "embedding"]),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
            ),
        )
        expected = logits(theirs, inputs("bert", seed=7))
    assert (logits(ours, inputs("bert", seed=7)) - expected).abs().max() < 1e-5
    places = {name for name, _ in getattr(theirs, "__nncf_hooks").named_hooks(remove_duplicate=False)}
    assert {name for e in entries(ours, "fake_quantizer") for name in e["at"]} == places


def test_attention_and_embeddings_have_no_quantizers():
    for attn in ("sdpa", "eager"):
        _, q = quantized("bert", attn=attn)
        places = " ".join(name for e in entries(q, "fake_quantizer") for name in e["at"])
        assert "embedding" not in places and "softmax" not in places
        assert "pre_hooks.bert/encoder/attention/self/matmul" not in places


def test_operations_that_read_one_tensor_share_a_quantizer():
    _, q = quantized("bert")
    shared = [e["at"] for e in entries(q, "fake_quantizer") if len(e["at"]) > 1]
    assert [sorted(name.split("/")[4] for name in at) for at in shared] == [["key", "query", "value"]] * 2
    state = q.state_dict()
    assert len({t.data_ptr() for t in state.values()}) == len(state), "a tensor is saved twice"


def test_preset_and_modes():
    _, q = quantized(config=qat(weights="asymmetric", activations="asymmetric"))
    assert not any(quantizer.symmetric for quantizer in found(q))
    _, q = quantized(config=ptq(preset="performance", smooth_quant=False))
    assert all(quantizer.symmetric for quantizer in found(q))
    _, q = quantized(config=ptq())
    assert all(quantizer.symmetric == bool(quantizer.weight_of) for quantizer in found(q))


def test_bias_correction_changes_biases_only_when_asked():
    model, q = quantized(config=ptq(fast_bias_correction=False))
    plain, _, _ = quantizers.detach(q)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in plain.state_dict().items())
    _, q = quantized(config=ptq())
    corrected = {
        n for n, t in quantizers.detach(q)[0].state_dict().items() if not torch.equal(t, model.state_dict()[n])
    }
    assert corrected and all(name.endswith(".bias") for name in corrected)


def test_calibration_is_deterministic_and_uses_the_batches():
    model, a = quantized(config=ptq())
    b = quantizers.quantize(model, ptq(), [inputs("bert", seed=i) for i in range(2)])
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())
    other = quantizers.quantize(model, ptq(), [inputs("bert", seed=9)])
    assert not all(torch.equal(t, b.state_dict()[n]) for n, t in other.state_dict().items())


def test_the_model_itself_is_left_alone():
    model = tiny("bert").train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    q = quantizers.quantize(model, qat(smooth_quant=True), [inputs("bert")])
    assert q.training and q.bert.encoder.layer[0].training and model.training
    assert type(q) is type(model) and not quantizers.is_quantized(model) and quantizers.is_quantized(q)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


# -- ignore and bits


def test_ignore_keeps_a_layer_in_fp32():
    _, q = quantized(config=qat(ignore=["encoder.layer.1", "re:pooler$", "classifier"]))
    assert weights(q) and all(name.startswith("bert.encoder.layer.0.") for name in weights(q))
    with pytest.raises(
        UserError, match=r"quantize\.ignore: 'encoder\.layers\.1' matches no module.*'encoder\.layer\.1'"
    ):
        quantized(config=qat(ignore=["encoder.layers.1"]))
    with pytest.raises(UserError, match=r"quantize\.ignore.*nothing is left"):
        quantized(config=qat(ignore=["bert", "classifier"]))


@pytest.mark.parametrize("smooth", [False, True])
def test_ignore_with_smooth_quant_leaves_the_weights_alone(smooth):
    model, q = quantized(config=qat(ignore=["encoder.layer.1"], smooth_quant=smooth))
    for name, parameter in model.bert.encoder.layer[1].named_parameters():
        assert torch.equal(q.bert.encoder.layer[1].get_parameter(name), parameter)
    assert not any("layer.1" in e["input_of"] for e in entries(q, "smooth"))


def test_bits():
    _, q = quantized(config=qat(bits={"encoder.layer.0.output": 4, "re:layer\\.1\\..*query": 4}))
    four = {name for name, quantizer in weights(q).items() if quantizer.bits == 4}
    assert four == {"bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.attention.self.query"}
    assert {quantizer.levels for name, quantizer in weights(q).items() if name in four} == {(-7, 7)}
    assert all(quantizer.bits == 8 for quantizer in found(q) if not quantizer.weight_of)
    with pytest.raises(UserError, match=r"quantize\.bits: 'embeddings' matches no layer with a quantized weight"):
        quantized(config=qat(bits={"embeddings": 4}))


def test_a_quantized_model_is_not_quantized_again():
    _, q = quantized()
    with pytest.raises(UserError, match="quantized already"):
        quantizers.quantize(q, qat(), [inputs("bert")])


def test_adapters_around_quantized_layers_are_refused():
    """NNCF numbers a module's calls, so that the matrices of adapters would take the quantizers of later layers."""
    import peft

    _, q = quantized()
    with pytest.raises(UserError, match="train adapters first, and quantize then"):
        LowRankAdapters(Lora()).prepare(q, Tools())
    wrapped = peft.get_peft_model(q, peft.LoraConfig(r=4, target_modules=["query", "key", "value"]))
    with pytest.raises(ModelError, match=r"the quantizer of .* layers were added to or taken from the model"):
        wrapped(**inputs("bert"))


# -- training


@pytest.mark.parametrize("family", ["wav2vec2", "vit", "opt"])
def test_every_kind_of_input_trains(family):
    """Wav2Vec2 asks for a gradient of its input in training; a quantizer stands there."""
    _, q = quantized(family)
    q.train()(**inputs(family, labels=True)).loss.backward()
    assert all(p.grad is not None for quantizer in found(q) for p in quantizer.parameters())


def test_ranges_train_and_are_named_for_no_weight_decay():
    _, q = quantized(config=qat(activations="asymmetric"))
    q.train()
    ranges = {n: p for n, p in q.named_parameters() if HOOKS in n}
    assert sum(len(list(m.parameters())) for m in found(q)) == len(ranges)
    optimizer = torch.optim.AdamW(q.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = q(**inputs("bert", labels=True)).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in q.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert sum(bool(p.grad.abs().sum() > 0) for p in ranges.values()) > 0.9 * len(ranges)


def test_a_copy_is_independent():
    _, q = quantized(config=ptq())
    expected, twin = logits(q, inputs("bert")), copy.deepcopy(q)
    for quantizer in found(twin):
        for parameter in quantizer.parameters():
            parameter.data *= 0.3
    assert torch.equal(logits(q, inputs("bert")), expected)
    assert not torch.equal(logits(twin, inputs("bert")), expected)


def test_layer_drop_is_switched_off():
    _, q = quantized("wav2vec2", layerdrop=0.5)
    assert q.config.layerdrop == 0


# -- save and restore, detach and attach


@pytest.mark.parametrize(
    ("family", "config"),
    [
        *((family, qat()) for family in FAMILIES),
        ("distilbert", qat(smooth_quant=True)),
        ("bert", ptq()),
        ("bert", qat(weights="asymmetric", activations="asymmetric")),
        ("bert", qat(bits={"encoder.layer.0.output": 4, "re:layer\\.1\\..*query": 4})),
    ],
)
def test_attach_and_a_strict_load_restore_the_model(family, config):
    _, q = quantized(family, config)
    description = json.loads(json.dumps(quantizers.config_of(q)))
    restored = quantizers.attach(tiny(family, seed=1), description)
    restored.load_state_dict(q.state_dict(), strict=True)
    assert quantizers.config_of(restored) == description
    assert torch.equal(logits(restored, inputs(family)), logits(q, inputs(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_detach_gives_the_plain_model_bit_for_bit(family):
    """Also the weights that SmoothQuant moved: its factors are powers of two."""
    model, q = quantized(family, qat(smooth_quant=True))
    factors = [m.scale for m in q.modules() if isinstance(m, placement.Smooth)]
    assert factors and all(torch.equal(f.log2(), f.log2().round()) for f in factors)
    assert any((f != 1).any() for f in factors)
    plain, description, tensors = quantizers.detach(q)
    assert not quantizers.is_quantized(plain) and quantizers.is_quantized(q)
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in plain.state_dict().items())
    assert torch.equal(logits(plain, inputs(family)), logits(model, inputs(family)))
    again = quantizers.attach(plain, description, tensors)
    assert torch.equal(logits(again, inputs(family)), logits(q, inputs(family)))


@pytest.mark.parametrize("smooth", [False, True], ids=["plain", "smooth"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_shrunk_quantized_model_is_the_masked_quantized_model(family, smooth):
    # Quantized while nothing was pruned, as at the start of a warm-up; then what will go is masked.
    model, q = quantized(family, qat(smooth_quant=smooth))
    structure = find_structure(model)
    kept = keep(structure, {0: [1]}, {i: list(range(0, 48, 3)) for i in range(2)})
    slices = slices_of(structure, kept)
    with torch.no_grad():
        for name, by_dim in slices.items():
            for dim, stays in by_dim.items():
                gone = torch.ones(q.get_parameter(name).shape[dim], dtype=bool).index_fill(0, stays, False)
                q.get_parameter(name).index_fill_(dim, gone.nonzero().flatten(), 0.0)
    masked = logits(q, inputs(family, seed=5))
    plain, description, tensors = quantizers.detach(q)
    shrink(plain, structure, kept)
    description, tensors = quantizers.slice_quantizers(description, tensors, slices)
    shrunk = quantizers.attach(plain, description, tensors)
    assert (logits(shrunk, inputs(family, seed=5)) - masked).abs().max() <= 1e-5
    assert sum(p.numel() for p in shrunk.parameters()) < sum(p.numel() for p in q.parameters())
    for name, quantizer in weights(shrunk).items():
        assert quantizer.shape[0] == shrunk.get_submodule(name).weight.shape[0]
    assert quantizers.config_of(shrunk) == description
    assert description != quantizers.config_of(q)


def test_configs_and_tensors_that_do_not_fit():
    _, q = quantized()
    _, description, tensors = quantizers.detach(q)
    with pytest.raises(ModelError, match="version 7, this mptrain reads 1"):
        quantizers.attach(tiny("bert"), {**description, "version": 7})
    with pytest.raises(ModelError, match="kind 'other'"):
        quantizers.attach(tiny("bert"), {**description, "modules": [{"kind": "other", "at": []}]})
    tensors.pop(next(iter(tensors)))
    with pytest.raises(ModelError, match="do not fit the quantizer config"):
        quantizers.attach(tiny("bert"), description, tensors)


# -- silence


def test_nothing_is_printed_sent_or_left_changed(capfd, monkeypatch):
    def refuse(*_, **__):
        pytest.fail("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("openvino_telemetry.Telemetry.send_event", refuse)
    monkeypatch.delenv("CI", raising=False)

    def surroundings():
        return (
            nncf_logger.level,
            track_progress.track.__init__,
            SmoothQuant.__dict__["_calculate_scale_and_ratio"],
            extensions.QuantizedFunctionsCPU._loaded_namespace,
            list(warnings.filters),
            "CI" in os.environ,
            logging.getLogger().level,
            torch.is_grad_enabled(),
            torch.get_rng_state().tolist(),
        )

    model = tiny("bert")
    before = surroundings()
    quantizers.quantize(model, ptq(), [inputs("bert")])
    assert surroundings() == before
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


def test_a_failure_leaves_nothing_changed():
    before = SmoothQuant.__dict__["_calculate_scale_and_ratio"], nncf_logger.level
    with pytest.raises(ValueError, match="input_ids"):
        quantizers.quantize(tiny("bert"), ptq(), [inputs("bert"), {"no_such_input": torch.zeros(1)}])
    assert (SmoothQuant.__dict__["_calculate_scale_and_ratio"], nncf_logger.level) == before


def test_torchs_own_attention_is_refused_by_name():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn is an nn\.MultiheadAttention.*weight_only"):
        quantizers.quantize(model, Ptq(mode="ptq"), [{"src": torch.randn(2, 3, 16)}])
