"""Core ML packages against the torch model, through the interpreter; the compressed weights in them, bit for bit."""

from __future__ import annotations

import json
from importlib import metadata

import numpy as np
import pytest
import torch
from coremltools.converters.mil.frontend.torch import ops
from coremltools.converters.mil.frontend.torch.converter import TorchConverter
from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY
from kit.coreml import FIXED, RANGED, TwoOutputs, small, texts
from kit.long import except_for
from kit.tiny_models import inputs
from torch import nn

from mptrain.cli import main
from mptrain.commands.verify import verify
from mptrain.compress.weights import records
from mptrain.compress.weights.records import BlockQuantized, Palettized
from mptrain.core.errors import ExportError, UserError
from mptrain.export.coreml import compat
from mptrain.export.coreml.convert import export_coreml
from mptrain.mil.facts import facts
from mptrain.mil.interpreter import Interpreter, weights
from mptrain.mil.program import Name
from mptrain.recipe import CoreMlShapes


def difference(model, runner, batch):
    with torch.no_grad():
        expected = model(**batch).logits.numpy()
    found = runner(batch)["logits"]
    assert found.shape == expected.shape
    if expected.ndim == 3 and "attention_mask" in batch:
        kept = batch["attention_mask"].bool().numpy()
        expected, found = expected[kept], found[kept]
    return float(np.abs(found - expected).max())


@pytest.mark.parametrize(
    ("family", "attn", "route", "mask"),
    except_for(
        [("bert", "sdpa", "export", True), ("opt", "eager", "trace", True), ("llama", "sdpa", "trace", False)],
        [("bert", "sdpa", "export", True)],
    ),
)
def test_a_ranged_package_is_the_model_at_every_length(family, attn, route, mask, tmp_path):
    model = small(family, attn)
    done = export_coreml(model, texts(2, 9, mask), tmp_path / "out", shapes=RANGED, route=route)
    runner = Interpreter(done.package)
    for batch, length in ((1, 1), (1, 2), (3, 5), (4, 32)):
        assert difference(model, runner, texts(batch, length, mask)) < 1e-5
    with pytest.raises(UserError, match=r"1\.\.4, 1\.\.32"):
        runner(texts(1, 33, mask))
    assert done.size_bytes == sum(f.stat().st_size for f in done.package.rglob("*") if f.is_file())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == family
    assert not model.training and getattr(model.config, "use_cache", True)


def test_enumerated_shapes_take_those_alone(tmp_path):
    model = small("distilbert", "eager")
    shapes = CoreMlShapes(kind="enumerated", batch=[1], length=[4, 7, 16])
    runner = Interpreter(export_coreml(model, texts(1, 5), tmp_path / "out", shapes=shapes).package)
    for length in (4, 7, 16):
        assert difference(model, runner, texts(1, length)) < 1e-5
    with pytest.raises(UserError, match=r"\[1, 4\] or \[1, 7\] or \[1, 16\]"):
        runner(texts(1, 5))


def test_images_and_float16(tmp_path):
    model = small("vit")
    shapes = CoreMlShapes(kind="ranged", batch=[1, 8], length=[1])
    done = export_coreml(model, inputs("vit"), tmp_path / "out", precision="fp16", shapes=shapes)
    runner = Interpreter(done.package)
    assert 0 < difference(model, runner, inputs("vit", batch=5, seed=3)) < 0.02
    assert difference(model, Interpreter(done.package, "fp32"), inputs("vit")) < 0.02  # the weights stay float16
    assert facts(runner.program)["inference_precision"] == "f16" and facts(runner.program)["float_casts"] == 0


def test_every_missing_operation_is_named(tmp_path):
    class Odd(nn.Module):
        def forward(self, input_ids):
            x = input_ids.float()
            return torch.special.bessel_j0(x) + torch.special.bessel_j0(x * 2) + torch.digamma(x + 1)

    for route in ("export", "trace"):
        with pytest.raises(ExportError, match=r"digamma.* \(1×\).*bessel_j0.* \(2×\)"):
            export_coreml(Odd(), texts(2, 9, mask=False), tmp_path / "out", shapes=FIXED, route=route)
    assert not (tmp_path / "out").exists()


def test_patches_end_with_the_block_and_are_tied_to_a_version(monkeypatch):
    before = dict(_TORCH_OPS_REGISTRY.name_to_func_mapping), ops._cast, ops._tqdm, TorchConverter._add_const
    with compat.compatible(), compat.storing({}):
        assert compat.supported("aten::__and__.Tensor") and not compat.supported("aten::digamma")
        assert ops._cast is not before[1] and TorchConverter._add_const is not before[3]
    assert before == (dict(_TORCH_OPS_REGISTRY.name_to_func_mapping), ops._cast, ops._tqdm, TorchConverter._add_const)
    monkeypatch.setattr(metadata, "version", lambda of: "99.0")
    with pytest.raises(UserError, match=r"pip install 'coremltools==9\.0'"), compat.compatible():
        pass


def test_a_text_encoder_with_two_outputs(tmp_path):
    model = TwoOutputs().eval()
    runner = Interpreter(export_coreml(model, texts(2, 9), tmp_path / "out", shapes=RANGED).package)
    assert runner.outputs == ["features", "embeddings"]
    batch = texts(3, 6)
    with torch.no_grad():
        expected = model(**batch)
    for name, value in runner(batch).items():
        np.testing.assert_allclose(value, expected[name].numpy(), atol=1e-6)


# -- compressed weights


def blocks(shape, bits, block, zero=False, seed=0):
    draw = torch.Generator().manual_seed(seed)
    rows, columns = shape
    low, high = (0, 2**bits) if zero else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    q = torch.randint(low, high, (rows, columns), generator=draw).to(torch.uint8 if zero else torch.int8)
    scale = torch.rand(rows, columns // block, generator=draw).mul(0.05).add(0.01).half().float()
    offset = torch.randint(low, high, scale.shape, generator=draw).to(q.dtype) if zero else None
    return BlockQuantized(q, scale, offset, bits)


def tables(shape, bits, rows_per_group, vector=1, seed=0, scale=False):
    draw = torch.Generator().manual_seed(seed)
    rows, columns = shape
    indices = torch.randint(0, 2**bits, (rows, columns // vector), generator=draw).to(torch.uint8)
    groups = -(-rows // rows_per_group)
    lut = torch.randn(groups, 2**bits, vector, generator=draw).mul(0.1).half().float()
    factors = torch.rand(rows, 1, generator=draw).half().float() + 0.5 if scale else None
    return Palettized(indices, lut, rows_per_group, factors, bits)


def compressed(made):
    """A one-layer BERT with records; `made`: by part of a weight's name, the record of its shape."""
    model = small("bert")
    found = {}
    for name, parameter in model.named_parameters():
        for part, build in made.items():
            if part in name and name.endswith("weight") and parameter.dim() == 2:
                found[name] = build(tuple(parameter.shape))
    records.attach(model, found)
    return model, found


def stored(package):
    """(type of the operation, stored types of its parts, decoded parts) by the shape and content of the data."""
    program = Interpreter(package, "fp32").program
    found = []
    for operation, parts in weights(program):
        values = {
            p: program.constants.get(v[0].name) if isinstance(v[0], Name) else v[0] for p, v in operation.inputs.items()
        }
        found.append((operation.type, {p: kind for p, (kind, _) in parts.items()}, values))
    return found


def test_integers_and_tables_are_stored_bit_for_bit(tmp_path):
    model, found = compressed(
        {
            "query": lambda shape: blocks(shape, 4, 8),
            "key": lambda shape: blocks(shape, 4, shape[1], zero=True),
            "value": lambda shape: blocks(shape, 8, shape[1]),
            "attention.output.dense": lambda shape: tables(shape, 4, 8),
            "intermediate": lambda shape: tables(shape, 3, shape[0]),
            "layer.0.output.dense": lambda shape: tables(shape, 2, 16, vector=2),
            "word_embeddings": lambda shape: blocks(shape, 4, 16),
        }
    )
    assert len(found) == 7
    for precision in ("fp32", "fp16"):
        done = export_coreml(model, texts(2, 9), tmp_path / precision, precision=precision, shapes=RANGED)
        assert done.floats == {}
        runner = Interpreter(done.package)
        assert difference(model, runner, texts(3, 6)) < (1e-5 if precision == "fp32" else 0.05)
        rows = stored(done.package)
        assert len(rows) == len(found)
        kinds = {"INT4": 0, "UINT4": 0, "INT8": 0, "UINT3": 0, "UINT2": 0}
        for record in found.values():
            wanted = record.q if isinstance(record, BlockQuantized) else record.indices
            part = "data" if isinstance(record, BlockQuantized) else "indices"
            matches = [r for r in rows if part in r[2] and r[2][part].shape == wanted.shape
                       and torch.equal(r[2][part], wanted.long())]  # fmt: skip
            assert len(matches) == 1
            operation, dtypes, values = matches[0]
            kinds[dtypes[part]] = kinds.get(dtypes[part], 0) + 1
            if part == "data":
                assert operation == "constexpr_blockwise_shift_scale"
                assert torch.equal(values["scale"], record.scale)
                assert record.zero is None or torch.equal(values["offset"], record.zero.long())
            else:
                assert operation == "constexpr_lut_to_dense"
                assert torch.equal(values["lut"].flatten(), record.lut.flatten())
            assert dtypes["scale" if part == "data" else "lut"] == ("FLOAT32" if precision == "fp32" else "FLOAT16")
        assert kinds == {"INT4": 2, "UINT4": 2, "INT8": 1, "UINT3": 1, "UINT2": 1}


@pytest.mark.long
def test_older_targets_hold_int8_and_one_table_and_refuse_the_rest(tmp_path):
    model, _ = compressed(
        {
            "query": lambda s: blocks(s, 8, s[1]),
            "key": lambda s: tables(s, 4, s[0]),
            "value": lambda s: tables(s, 5, s[0]),
        }
    )
    done = export_coreml(model, texts(2, 9), tmp_path / "16", target="iOS16", shapes=FIXED)
    assert difference(model, Interpreter(done.package), texts(2, 9)) < 1e-5
    kinds = [row[0] for row in stored(done.package)]
    assert sorted(kinds) == ["constexpr_affine_dequantize", "constexpr_lut_to_dense", "constexpr_lut_to_dense"]
    for record, message in [
        (lambda s: blocks(s, 4, 8), "4-bit integers with 4 scales to a row need minimum_deployment_target iOS18"),
        (lambda s: tables(s, 4, 8), "4 tables of 4 bits"),
        (lambda s: tables(s, 3, 32), "1 tables of 3 bits"),
    ]:
        with pytest.raises(UserError, match=message):
            export_coreml(compressed({"query": record})[0], texts(2, 9), tmp_path / "no", target="iOS17", shapes=FIXED)
    with pytest.raises(UserError, match="iOS15 stores no compressed weights"):
        export_coreml(model, texts(2, 9), tmp_path / "no", target="iOS15", shapes=FIXED)
    assert not (tmp_path / "no").exists()


def test_scaled_tables_and_uneven_groups(tmp_path):
    model, _ = compressed({"query": lambda s: tables(s, 4, 8, scale=True), "key": lambda s: tables(s, 4, 12)})
    with pytest.raises(UserError, match="scaled_tables: true"):
        export_coreml(model, texts(2, 9), tmp_path / "out", shapes=FIXED)
    done = export_coreml(model, texts(2, 9), tmp_path / "out", shapes=FIXED, scaled_tables=True)
    assert list(done.floats.values()) == ["32 rows are not a multiple of its groups of 12"]
    assert difference(model, Interpreter(done.package), texts(2, 9)) < 1e-5
    assert sorted(row[0] for row in stored(done.package)) == [
        "constexpr_blockwise_shift_scale",
        "constexpr_lut_to_dense",
    ]


# -- mptrain verify


@pytest.mark.long
def test_verify_says_whether_a_package_is_its_source(tmp_path, capsys):
    from mptrain.models import artifact

    model, other = small("bert"), small("bert", seed=5)
    done = export_coreml(model, texts(2, 9), tmp_path / "out", precision="fp16", shapes=RANGED)
    artifact.save(model, tmp_path / "model")
    artifact.save(other, tmp_path / "other")
    target = tmp_path / "found.json"
    assert main(["verify", str(done.package), "--model", str(tmp_path / "model"), "--json", str(target)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "is the source model" in shown and "Neural Engine" in shown
    found = json.loads(target.read_text())
    assert found["passed"] and found["inference_precision"] == "f16" and found["float_casts"] == 0
    assert 0 < found["parity"]["max_abs_diff"] < 0.05 and found["parity"]["cosine"] > 0.9999
    assert {tuple(run["shapes"]["input_ids"]) for run in found["runs"]} == {(1, 1), (2, 16), (2, 32)}
    assert main(["verify", str(done.package), "--model", str(tmp_path / "other")]) == 1
    assert "is not the source model" in " ".join(capsys.readouterr().out.split())
    assert main(["verify", str(tmp_path / "nothing.mlpackage")]) == 2


def test_verify_finds_what_breaks_in_float16(tmp_path):
    class Masked(TwoOutputs):
        def forward(self, input_ids, attention_mask):
            hidden = self.table(input_ids)
            bias = (1.0 - attention_mask.float())[:, None, :] * torch.finfo(torch.float32).min
            scores = (hidden @ hidden.transpose(1, 2) + bias).softmax(-1)
            return {"features": scores @ hidden}

    package = export_coreml(Masked().eval(), texts(2, 9), tmp_path / "out", shapes=RANGED).package
    exact, half = verify(package), verify(package, precision="fp16")
    assert exact["passed"] and not half["passed"] and half["not_finite"]
    assert exact["operations_run"][0]["largest"] > 1e38
