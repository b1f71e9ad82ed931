import asyncio
import functools
import json

import numpy as np
import pytest
import torch
from kit.coreai_constants import constants
from kit.tiny import tokenizer
from kit.tiny_models import inputs, tiny

from mptrain.compress.quantize import quantizers
from mptrain.compress.weights import records
from mptrain.compress.weights.records import BlockQuantized, Palettized
from mptrain.core.disk import size
from mptrain.core.errors import ExportError, ModelError, UserError
from mptrain.export.coreai import facts as verify
from mptrain.export.coreai.convert import export_coreai
from mptrain.export.coreai.runner import Asset
from mptrain.export.coreai.weights import stored_bits
from mptrain.recipe import Qat
from mptrain.verify.parity import compare

FAMILIES = ["bert", "roberta", "distilbert", "vit", "opt", "llama"]


def outputs(model, batch):
    with torch.no_grad():
        return model(**batch).logits.numpy()


def other(family, batch, length):
    """Inputs of another batch size and length than the traced ones."""
    found = inputs(family, batch=batch, seed=batch)
    if "input_ids" not in found:
        return found
    found = {name: torch.cat([value] * 2, 1)[:, :length] for name, value in found.items()}
    found["attention_mask"] = found["attention_mask"].cummin(1)[0]  # padding stays on the right
    return found


def difference(model, runner, batch):
    return compare(model, runner, [batch])["max_abs_diff"]


# -- graphs


@pytest.mark.parametrize("family", ["bert", pytest.param("vit", marks=pytest.mark.long)])
def test_an_asset_runs_at_every_shape(family, tmp_path):
    model = tiny(family)
    model.config.auto_map = {"AutoModel": "modeling.Class"}
    done = export_coreai(model, inputs(family, batch=2), tmp_path / "out", processor=tokenizer())
    runner = Asset(done.asset)
    assert runner.inputs == list(inputs(family)) and runner.outputs == ["logits"]
    for batch in (inputs(family), other(family, 1, 1), other(family, 5, 13)):
        assert difference(model, runner, batch) < 1e-5

    facts = runner.facts().as_json()
    assert (facts["fused_attention"], facts["attention_layers"], facts["casts"]) == (2, 2, 0)
    assert facts["inference_precision"] == "f32" and list(facts["weight_types"]) == ["Float32"]
    assert facts["minimum_os"] == "27.0" and json.loads(json.dumps(facts)) == facts
    parameters = 4 * sum(p.numel() for p in model.parameters())
    assert parameters <= facts["weight_types"]["Float32"] <= parameters + 400
    assert done.size_bytes == size(done.asset) > parameters
    assert {p.name for p in done.folder.iterdir()} >= {"model.aimodel", "config.json", "tokenizer.json"}
    assert "auto_map" not in json.loads((done.folder / "config.json").read_text())
    assert model.config.auto_map and str(tmp_path) not in (done.asset / "metadata.json").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.long
def test_fp16_with_a_module_in_fp32(tmp_path):
    model, batch = tiny("bert"), inputs("bert")
    plain = export_coreai(model, batch, tmp_path / "plain", precision="fp16")
    kept = export_coreai(model, batch, tmp_path / "kept", precision="fp16", keep_fp32=["classifier"])
    one, other_ = (Asset(done.asset) for done in (plain, kept))
    assert difference(model, one, batch) < 2e-3
    assert difference(model, other_, batch) < 2e-3
    assert one(batch)["logits"].dtype == np.float16
    first, second = one.facts().as_json(), other_.facts().as_json()
    assert first["inference_precision"] == second["inference_precision"] == "f16"
    assert (first["casts"], plain.half) == (0, {"kept_fp32": {}, "float_casts": 0})
    assert second["casts"] == 2 == kept.half["float_casts"] and set(kept.half["kept_fp32"].values()) == {"asked for"}
    assert first["weight_types"]["Float16"] >= 2 * model.num_parameters()
    assert first["weight_types"].get("Float32", 0) < 100
    with pytest.raises(UserError, match="no operation and no module"):
        export_coreai(model, batch, tmp_path / "no", precision="fp16", keep_fp32=["nowhere"])


@pytest.mark.parametrize(
    ("attn", "precision", "limit"),
    [
        pytest.param("sdpa", "fp16", 2e-2, marks=pytest.mark.long),
        pytest.param("eager", "fp16", 2e-2, marks=pytest.mark.long),
        pytest.param("eager", "fp32", 1e-5, marks=pytest.mark.long),
    ],
)
def test_left_padding_of_a_causal_model(attn, precision, limit, tmp_path):
    model, batch = tiny("llama", attn=attn, num_hidden_layers=1), inputs("llama")
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    done = export_coreai(model, inputs("llama", batch=2), tmp_path / precision, precision=precision)
    assert difference(model, Asset(done.asset), batch) < limit


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("shapes", ["dynamic", "fixed"])
def test_every_family(family, attn, shapes, tmp_path):
    model, batch = tiny(family, attn=attn), inputs(family)
    done = export_coreai(model, batch, tmp_path / "fp32", shapes=shapes)
    assert difference(model, Asset(done.asset), batch) < 1e-5


def test_fixed_shapes_and_wrong_inputs(tmp_path):
    model, batch = tiny("distilbert", n_layers=1), inputs("distilbert")
    runner = Asset(export_coreai(model, batch, tmp_path / "out", shapes="fixed").asset)
    assert difference(model, runner, batch) < 1e-5
    with pytest.raises(ExportError, match=r"input_ids is \[1, 9\], the asset was exported for \[3, 9\]"):
        runner(inputs("distilbert", batch=1))
    with pytest.raises(ExportError, match="lacks"):
        runner({"input_ids": batch["input_ids"]})

    async def inside_a_loop():  # as in Jupyter
        return runner(batch)["logits"]

    assert np.array_equal(asyncio.run(inside_a_loop()), runner(batch)["logits"])


def test_refusals(tmp_path):
    model, batch = tiny("bert"), inputs("bert")
    with pytest.raises(UserError, match="would stay fixed"):
        export_coreai(model, inputs("bert", batch=1), tmp_path / "out")
    quantized = quantizers.quantize(model, Qat(mode="qat"), [batch])
    with pytest.raises(UserError, match="quantizers"):
        export_coreai(quantized, batch, tmp_path / "out")
    with pytest.raises(UserError, match="fp16"):
        export_coreai(model, batch, tmp_path / "out", keep_fp32=["classifier"])
    with pytest.raises(UserError, match="bfloat16"):
        export_coreai(tiny("bert").bfloat16(), batch, tmp_path / "out")
    with pytest.raises(ExportError, match=r"no Core AI asset"):
        Asset(tmp_path)
    assert not list(tmp_path.iterdir())


def test_unsupported_operations_are_named_at_once(tmp_path):
    class Strange(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.config, self.dtype = inner, inner.config, inner.dtype

        def forward(self, **batch):
            logits = self.inner(**batch).logits
            return {"logits": torch.linalg.svdvals(logits) + torch.special.bessel_j0(logits)[..., :3]}

    with pytest.raises(ExportError) as caught:
        export_coreai(Strange(tiny("distilbert")), inputs("distilbert"), tmp_path / "out", shapes="fixed")
    assert "svd" in str(caught.value) and "bessel_j0" in str(caught.value)
    assert not list(tmp_path.iterdir())


# -- compressed weights


def integers(low, high, shape, seed, dtype):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def reals(shape, seed):
    """Multiples of 1/64: fp16 numbers."""
    return integers(-64, 64, shape, seed, torch.int64).float() / 64


def compressed(model):
    """A model with records of every kind, by weight name."""
    layer = "encoder.layer.0."
    prefix = f"bert.{layer}"
    blocks = {
        "attention.self.query": (4, torch.int8, (32, 4), False),
        "attention.self.key": (4, torch.uint8, (32, 2), True),
        "attention.self.value": (8, torch.int8, (32, 1), False),
        "attention.output.dense": (3, torch.int8, (1, 1), False),
    }
    found = {}
    for seed, (name, (bits, dtype, scales, zero)) in enumerate(blocks.items()):
        low, high = (0, 2**bits - 1) if dtype == torch.uint8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        q = integers(low, high, (32, 32), seed, dtype)
        zeros = integers(low, high, scales, seed, dtype) if zero else None
        found[f"{prefix}{name}.weight"] = BlockQuantized(q, reals(scales, seed).abs() / 64 + 1 / 64, zeros, bits)
    tables = {
        # bits, rows, columns, cluster_dim, rows per group, scale
        "bert.embeddings.word_embeddings": (4, 50, 32, 1, 16, False),
        "bert.embeddings.token_type_embeddings": (1, 2, 32, 1, 2, False),
        "bert.embeddings.position_embeddings": (6, 40, 32, 1, 40, False),
        f"{prefix}intermediate.dense": (3, 48, 32, 1, 16, True),
        f"{prefix}output.dense": (2, 32, 48, 2, 32, False),
        "bert.encoder.layer.1.intermediate.dense": (8, 48, 32, 1, 48, False),
        "bert.encoder.layer.1.output.dense": (5, 32, 48, 1, 32, False),
    }
    for seed, (name, (bits, rows, columns, cluster, group, scale)) in enumerate(tables.items(), 10):
        indices = integers(0, 2**bits - 1, (rows, columns // cluster), seed, torch.uint8)
        lut = reals((-(-rows // group), 2**bits, cluster), seed) / 4
        found[f"{name}.weight"] = Palettized(indices, lut, group, reals((rows, 1), seed) if scale else None, bits)
    records.attach(model, found)
    return found


@pytest.fixture(scope="module")
def stored_model(tmp_path_factory):
    model = tiny("bert")
    found = compressed(model)
    folder = tmp_path_factory.mktemp("asset")

    @functools.cache
    def export(precision):
        return export_coreai(model, inputs("bert"), folder / precision, precision=precision)

    return model, found, export


HALF = pytest.param("fp16", marks=pytest.mark.long)


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), pytest.param("fp16", 5e-3, marks=pytest.mark.long)])
def test_compressed_weights_compute_what_the_dense_model_computes(stored_model, precision, limit):
    model, _, export = stored_model
    assert difference(model, Asset(export(precision).asset), other("bert", 5, 13)) < limit
    assert type(model.bert.pooler.dense) is type(model.bert.encoder.layer[0].output.dense)  # nothing is left behind
    assert records.of(model).keys() == dict(model.named_parameters()).keys() & records.of(model).keys()


@pytest.mark.parametrize("precision", ["fp32", HALF])
def test_the_asset_holds_the_same_integers_and_tables(stored_model, precision):
    _, found, export = stored_model
    asset = export(precision).asset
    real = {"fp32": "f32", "fp16": "f16"}[precision]
    held = constants(asset)

    def holds(kind, values):
        return any(k == kind and v.shape == values.shape and np.array_equal(v, values) for k, v in held)

    for name, record in found.items():
        if isinstance(record, Palettized):
            bits = {5: 6}.get(record.bits, record.bits)
            assert stored_bits(record) == bits
            assert holds(f"ui{bits}", record.indices.numpy()), name
        else:
            bits = {3: 4}.get(record.bits, record.bits)
            assert stored_bits(record) == bits
            sign = "u" if record.q.dtype == torch.uint8 else "s"
            assert holds(f"{sign}i{bits}", record.q.numpy()), name
    word = found["bert.embeddings.word_embeddings.weight"]  # 50 rows in groups of 16 become 25 groups of 2
    assert holds(real, word.lut.repeat_interleave(8, 0)[:25, None].numpy())
    wide = found["bert.encoder.layer.1.intermediate.dense.weight"]
    assert holds(real, wide.lut[:, None].numpy())

    types = verify.stored_types(asset)
    pairs = [(r, stored_bits(r)) for r in found.values()]
    for kind, cls, bits in (("UInt3", Palettized, 3), ("UInt2", Palettized, 2), ("UInt6", Palettized, 6)):
        assert types[kind] == sum(r.indices.numel() * bits // 8 for r, b in pairs if isinstance(r, cls) and b == bits)
    assert {"Int4", "UInt4", "Int8", "UInt8", "UInt1"} <= types.keys()


def test_a_tied_weight_is_stored_once(tmp_path):
    model = tiny("opt", num_hidden_layers=1)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    table = Palettized(integers(0, 15, (50, 32), 1, torch.uint8), reals((1, 16, 1), 2), 50, None, 4)
    records.attach(model, {"lm_head.weight": table})
    done = export_coreai(model, inputs("opt"), tmp_path / "out")
    assert difference(model, Asset(done.asset), inputs("opt", seed=2)) < 1e-5
    assert verify.stored_types(done.asset)["UInt4"] == 50 * 32 // 2
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_convolution_is_stored_too(tmp_path):
    model = tiny("vit", num_hidden_layers=1)
    name = "vit.embeddings.patch_embeddings.projection.weight"
    weight = model.get_parameter(name).flatten(1)
    q = BlockQuantized(integers(-8, 7, tuple(weight.shape), 1, torch.int8), reals((32, 3), 2).abs() / 16, None, 4)
    records.attach(model, {name: q})
    done = export_coreai(model, inputs("vit"), tmp_path / "out")
    assert difference(model, Asset(done.asset), inputs("vit", seed=2)) < 1e-5
    assert any(k == "si4" and np.array_equal(v, q.q.numpy()) for k, v in constants(done.asset))


def test_a_weight_that_changed_since_is_refused(tmp_path):
    model = tiny("bert")
    compressed(model)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.add_(1)
    with pytest.raises(ModelError, match="was changed after its compression"):
        export_coreai(model, inputs("bert"), tmp_path / "out")
