import numpy as np
import pytest
import torch
from coremltools.optimize._utils import quantize_weight
from kit.tiny_models import inputs, logits, tiny
from nncf import CompressWeightsMode
from nncf.quantization.algorithms.weight_compression.config import WeightCompressionConfig
from nncf.quantization.algorithms.weight_compression.weight_lowering import (
    calculate_integer_quantization_params,
    do_integer_quantization,
)
from nncf.tensor import Tensor as NncfTensor

from mptrain.compress.calibrate import layerwise
from mptrain.compress.weights import records, weight_only
from mptrain.compress.weights.gptq import DAMPING, factor, gptq
from mptrain.compress.weights.grid import Grid, min_max, round_to_nearest, to_levels
from mptrain.compress.weights.scale_search import best_scales, search
from mptrain.core.errors import ModelError, UserError
from mptrain.recipe import WeightOnly

GRANULARITIES = [("tensor", 32), ("channel", 32), ("block", 8), ("block", 1), ("block", 32)]


def on_grid(rows, columns, step, seed=0):
    """A weight whose largest and smallest values make every scale the fp16 number `step` on a grid of 4 bits."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).clamp(-1.4, 1.4) * step * 4
    weight[:, ::4] = 7 * step
    weight[:, 1::4] = -8 * step
    return weight


# -- round to nearest


@pytest.mark.parametrize(("granularity", "block"), GRANULARITIES[:3])
@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_is_what_core_ml_tools_store(granularity, block, bits):
    weight = on_grid(6, 32, 0.0625) if bits == 4 else torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    weight[:, 2::8] = (7 if bits == 4 else 127) * 0.0625  # the largest of each unit: an fp16 scale
    weight = weight.clamp(-7 * 0.0625, 7 * 0.0625) if bits == 4 else weight
    record = round_to_nearest(weight, Grid(bits, granularity, block))
    assert (record.scale == 0.0625).all()
    axes, shaped = {"tensor": ((0, 1), weight), "channel": ((1,), weight)}.get(
        granularity, ((2,), weight.unflatten(1, (-1, block)))
    )
    q, scale, _ = quantize_weight(shaped.numpy(), axes, bits, True, "LINEAR_SYMMETRIC", np.int8)
    assert np.array_equal(record.q.numpy(), q.reshape(6, 32))
    assert np.array_equal(np.unique(record.scale), np.unique(scale))


@pytest.mark.parametrize(("granularity", "block"), GRANULARITIES[1:3])
def test_asymmetric_is_what_nncf_stores(granularity, block):
    weight = on_grid(6, 32, 0.0625)
    record = round_to_nearest(weight, Grid(4, granularity, block, symmetric=False))
    config = WeightCompressionConfig(mode=CompressWeightsMode.INT4_ASYM, group_size=-1)
    units = NncfTensor(weight.unflatten(1, (-1, block if granularity == "block" else 32)).numpy())
    scale, zero = calculate_integer_quantization_params(units, (2,), config)
    expected = do_integer_quantization(units, config, precomputed_scale=scale, precomputed_zero_point=zero)
    assert np.array_equal(record.q.numpy(), expected.tensor.data.reshape(6, 32))
    assert np.array_equal(record.scale.numpy(), scale.data[..., 0])
    assert np.array_equal(record.zero.numpy(), zero.data[..., 0])


@pytest.mark.parametrize("method", ["rtn", "scale", "gptq"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("granularity", "block"), GRANULARITIES)
def test_hard_weights(method, symmetric, granularity, block):
    """Zeros, constants, dead inputs, tiny and huge values: finite, and exact where the grid has the value."""
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    weight[0] = 0
    weight[1] = 0.75
    weight[2] = -0.75
    weight[3] = 1e-30
    weight[4, :8] = 0
    weight[5] = 60000
    grid = Grid(4, granularity, block, symmetric)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
    x[:, 5] = 0
    h = x.T.double() @ x.double()
    record = compressed(weight, grid, method, h)
    dense = record.dense()
    assert dense.isfinite().all()
    assert record.q.aminmax()[0] >= grid.levels[0] and record.q.aminmax()[1] <= grid.levels[1]
    if granularity != "tensor":
        assert (dense[0] == 0).all() and dense[3].abs().max() < 1e-6
        torch.testing.assert_close(dense[[1, 2, 5]], weight[[1, 2, 5]], rtol=2e-2, atol=0)
    assert all(part.is_contiguous() for part in (record.q, record.scale, record.zero) if part is not None)
    again = compressed(weight, grid, method, h)
    assert torch.equal(again.q, record.q) and torch.equal(again.scale, record.scale)
    for bad in (torch.nan, torch.inf, 1e6):
        weight[7, 3] = bad
        with pytest.raises(ModelError, match=r"NaN or infinite|beyond fp16"):
            compressed(weight, grid, method, h)


def known(h, grid):
    return factor(h[None], grid.block(len(h)))[0]


def compressed(weight, grid, method, h):
    if method == "gptq":
        return gptq(weight, grid, known(h, grid))
    return search(weight, grid, h.diagonal()) if method == "scale" else round_to_nearest(weight, grid)


def test_a_partial_block_is_an_error():
    with pytest.raises(UserError, match=r"32 does not divide 48 columns.*use 24"):
        round_to_nearest(torch.randn(4, 48), Grid(4, "block", 32))


# -- scale search


@pytest.mark.parametrize("symmetric", [True, False])
def test_scale_search_against_every_scale(symmetric):
    """Within 2% (asymmetric: 10%) of the best of 800 scales times all zero points; never worse than min-max."""
    generator = torch.Generator().manual_seed(0)
    units = torch.randn(24, 1, 6, generator=generator)
    importance = torch.rand(24, 1, 6, generator=generator) + 0.01
    grid = Grid(4, "block", 6, symmetric)
    scale, zero = best_scales(units, grid, importance)

    def error(scale, zero):
        shifted = to_levels(units, scale, zero, grid) - zero[..., None]
        return (importance * (shifted * scale[..., None] - units).square()).sum(-1)

    found = error(scale, zero)
    best = torch.full_like(found, torch.inf)
    for z in [0] if symmetric else range(16):
        for factor_ in torch.linspace(0.02, 1.2, 800):
            every = units.abs().amax(-1) / grid.levels[1] * factor_ * (1 if symmetric else 2)
            best = torch.minimum(best, error(every, torch.full_like(every, z)))
    assert (found <= error(*min_max(units, grid))).all()
    assert found.sum() <= (1.02 if symmetric else 1.1) * best.sum()


def test_importance_moves_the_scale():
    weight = torch.tensor([[0.1, 0.33, 0.52, 1.4]])
    grid = Grid(4, "channel")
    ignoring = search(weight, grid, torch.tensor([1.0, 1.0, 1.0, 0.0])).dense()
    torch.testing.assert_close(ignoring[:, :3], weight[:, :3], rtol=0, atol=0.02)
    assert abs(float(ignoring[0, 3]) - 1.4) > 0.5 > 0.1 > abs(float(search(weight, grid).dense()[0, 3]) - 1.4)


# -- GPTQ


def reference(weight, h, grid):
    """Optimal brain quantization in fixed order, float64: the inverse of H is reduced a column at a time."""
    w = weight.double().numpy().copy()
    h = h.double().numpy().copy()
    h[np.diag_indices_from(h)] += DAMPING * np.mean(np.diag(h))
    inverse = np.linalg.inv(h)
    final = np.array([np.linalg.inv(h[j:, j:])[0, 0] for j in range(len(h))])
    q = np.zeros_like(w)
    block = grid.block(w.shape[1])
    for j in range(w.shape[1]):
        if j % block == 0:
            units = torch.from_numpy(w[:, None, j : j + block].copy())
            cost = torch.from_numpy(1 / final[j : j + block]).expand_as(units)
            scale, zero = (v.numpy()[:, 0] for v in best_scales(units, grid, cost))
        q[:, j] = np.clip(np.round(w[:, j] / scale) + zero, *grid.levels)
        error = w[:, j] - (q[:, j] - zero) * scale
        w -= np.outer(error, inverse[j] / inverse[j, j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return q


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("granularity", "block", "columns"), [("channel", 0, 150), ("block", 16, 160), ("block", 4, 12)]
)
def test_gptq_against_optimal_brain_quantization(granularity, block, columns, symmetric):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, columns, generator=generator)
    x = torch.randn(400, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    h = x.T @ x / 400
    grid = Grid(4, granularity, block, symmetric)
    factored = known(h, grid)
    order = factored.order
    assert order.sort().values.tolist() == list(range(columns))
    if granularity == "block":
        assert all((order.view(-1, block) // block).diff(dim=1).eq(0).all(1))  # blocks stay whole
    record = gptq(weight, grid, factored, sweeps=0)
    assert np.array_equal(record.q[:, order].numpy(), reference(weight[:, order], h[order][:, order], grid))

    def loss(dense):
        return float(((weight - dense).double() @ h.double() * (weight - dense).double()).sum())

    assert loss(record.dense()) < 0.9 * loss(search(weight, grid).dense())
    assert loss(gptq(weight, grid, factored).dense()) < 0.97 * loss(record.dense())


def test_moments_that_are_not_finite():
    with pytest.raises(ModelError, match="not finite"):
        factor(torch.full((1, 3, 3), torch.nan), 3)


# -- a model


def batches(family, count=3):
    return [inputs(family, seed=i) for i in range(count)]


def linears(model, *, layers_only=False):
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not (layers_only and not any(c.isdigit() for c in name.split(".")))
    }


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit", "opt", "llama", "swin", "wav2vec2"])
def test_layer_by_layer_is_the_whole_model(family, monkeypatch):
    """The same bits as running the whole model for every layer, with weights changed on the way."""
    names = linears(tiny(family))

    def changed(chain):
        if not chain:
            monkeypatch.setattr(layerwise, "_chained", lambda *_: None)
        model, found = tiny(family), {}
        for moments in layerwise.walk(model, names, batches(family)):
            found |= moments
            with torch.no_grad():
                for name in moments:
                    model.get_submodule(name).weight.mul_(0.9)
        return found

    streamed, whole = changed(True), changed(False)
    assert streamed.keys() == whole.keys() == names
    assert all(torch.equal(streamed[name], whole[name]) for name in names)


def test_a_head_is_given_what_the_last_layer_gave():
    """The layers do not run once more for it, and it does not compute."""
    model, calls = tiny("llama"), []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append("layer"))
    model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    given = batches("llama") * 3
    found = dict(kv for moments in layerwise.walk(model, linears(model), given) for kv in moments.items())
    once = 2  # runs of the first text alone, that tell how things are connected
    assert calls.count("layer") == 2 * len(given) + once and calls.count("head") == once
    assert found["lm_head"].trace() > 0


def test_padding_does_not_count():
    name = "bert.encoder.layer.1.output.dense"
    batch = inputs("bert")
    kept = {"input_ids": batch["input_ids"][:1, :6], "attention_mask": batch["attention_mask"][:1, :6]}
    padded = {key: value[:1] for key, value in batch.items()}
    (a,), (b,) = (list(layerwise.walk(tiny("bert"), {name}, [x])) for x in (kept, padded))
    assert padded["attention_mask"].sum() == 6
    torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["rtn", "scale", "gptq"])
@pytest.mark.parametrize("family", ["bert", "opt"])
def test_compress(family, method):
    config = WeightOnly(mode="weight_only", method=method, block_size=16)
    models = [tiny(family), tiny(family)]
    for model in models:
        weight_only.compress(model, config, batches(family))
    found, again = (records.distinct(records.of(m)) for m in models)
    assert all(torch.equal(found[name].q, again[name].q) for name in found)
    for name, record in found.items():
        module = models[0].get_submodule(name.removesuffix(".weight"))
        table = isinstance(module, torch.nn.Embedding)
        assert (record.bits, record.block_size) == ((8, record.shape[1]) if table else (4, 16))
    assert {f"{n}.weight" for n in linears(models[0])} <= set(records.of(models[0]))
    reference_logits = logits(tiny(family), inputs(family))
    assert 0 < (logits(models[0], inputs(family)) - reference_logits).norm() < reference_logits.norm()


def test_gptq_is_closer_than_rtn():
    def distance(method):
        model = tiny("opt")
        config = WeightOnly(mode="weight_only", method=method, block_size=16, embeddings="fp32", lm_head="fp32")
        weight_only.compress(model, config, [inputs("opt", batch=32, seed=i) for i in range(4)])
        batch = inputs("opt", batch=32, seed=9)
        return float((logits(model, batch) - logits(tiny("opt"), batch)).norm())

    assert distance("gptq") < distance("rtn")


def test_choices():
    config = WeightOnly.model_validate(
        {
            "mode": "weight_only",
            "granularity": "channel",
            "ignore": ["classifier", "token_type_embeddings"],
            "embeddings": "same",
            "overrides": {
                "attention": {"bits": 8, "symmetric": False},
                "layer.1": {"granularity": "block", "block_size": 16},
                "re:word_emb": {"method": "rtn"},
            },
        }
    )
    plan = weight_only.choices(tiny("bert"), config)
    layer = "bert.encoder.layer.{}.{}.weight"
    assert plan[layer.format(0, "intermediate.dense")].grid == Grid(4, "channel", 32)
    assert plan[layer.format(0, "attention.self.query")].grid == Grid(8, "channel", 32, False)
    assert plan[layer.format(1, "attention.self.query")].grid == Grid(8, "block", 16, False)
    assert plan["bert.embeddings.word_embeddings.weight"].method == "rtn"
    assert plan["bert.embeddings.position_embeddings.weight"].method == "gptq"
    assert not [name for name in plan if "classifier" in name or "token_type" in name]


@pytest.mark.parametrize(
    ("family", "change", "problem"),
    [
        ("bert", {"ignore": ["clasifier"]}, "ignore.*classifier"),
        ("bert", {"overrides": {"layer.9": {"bits": 8}}}, "overrides.*layer.9"),
        ("bert", {"block_size": 64}, r"weight: block_size 64 does not divide 32 columns.*more"),
        ("opt", {"embeddings": "same"}, "lm_head: int8 and quantize.embeddings: same.*tied"),
        ("bert", {"ignore": ["bert", "classifier"]}, "nothing is left"),
    ],
)
def test_mistakes(family, change, problem):
    with pytest.raises(UserError, match=problem):
        weight_only.compress(tiny(family), WeightOnly(mode="weight_only", **change), batches(family))


def test_more_mistakes():
    config = WeightOnly(mode="weight_only", block_size=16)
    with pytest.raises(UserError, match="calibration"):
        weight_only.compress(tiny("bert"), config)
    model = tiny("bert")
    with torch.no_grad():
        model.classifier.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"classifier\.weight.*NaN"):
        weight_only.compress(model, config, batches("bert"))
