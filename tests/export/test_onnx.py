"""ONNX files: few casts where fp16 breaks, weights as their integers, layers that onnxruntime computes in integers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers as t
from kit.tiny_models import inputs, tiny
from torch import nn

import mptrain
from mptrain.cli import main
from mptrain.compress.quantize import quantizers
from mptrain.compress.weights import records, weight_only
from mptrain.core.errors import ExportError, UserError
from mptrain.core.signature import BATCH, Port, Signature
from mptrain.export.onnx import convert
from mptrain.export.onnx.facts import facts
from mptrain.export.onnx.runner import Session, opened
from mptrain.export.onnx.weights import _packed
from mptrain.recipe import Qat, WeightOnly
from mptrain.verify import parity


class Loud(nn.Module):
    """x + down(up(x)), where `up` gives 1e5 and `down` takes it back: three operations that fp16 breaks."""

    def __init__(self, scale: float = 1e5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)
        with torch.no_grad():
            self.up.weight *= scale
            self.down.weight /= scale

    def forward(self, x):
        y = self.down(torch.relu(self.up(x)))
        return {"logits": self.head(torch.tanh(x.flip(1) + y))}


X = {"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(1))}
SIGNATURE = Signature((Port("x", (BATCH, 8)),), (Port("logits", (BATCH, 4)),))


def test_a_value_that_crosses_is_cast_once_and_nothing_else_is(tmp_path):
    done = convert.write(Loud().eval(), X, tmp_path, precision="fp16", calibration=[X], signature=SIGNATURE)
    found = facts(done.path)
    # the operation that makes 1e5, the one that passes it on and the one that reads it; x comes in, y goes back, logits
    assert len(done.half["kept_fp32"]) == 3 and found.float_casts <= 4
    with torch.no_grad():
        expected = Loud().eval()(**X)["logits"].numpy()
    got = Session(done.path)(X)["logits"]
    assert got.dtype == np.float32 and abs(got - expected).max() < 5e-3
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    done = convert.write(Loud(1.0).eval(), X, quiet, precision="fp16", calibration=[X], signature=SIGNATURE)
    assert done.half["kept_fp32"] == {} and facts(done.path).float_casts == 2, "the input and the output"
    assert set(facts(done.path).weight_types) == {"float16"}


def test_int8_layers_compute_in_integers_with_the_learned_ranges(tmp_path):
    model = quantizers.quantize(tiny("bert"), Qat(mode="qat", reduce_range=True), [inputs("bert")])
    done = convert.write(model, inputs("bert"), tmp_path)
    found = facts(done.path)
    assert len(found.int8_layers) == 12 and "bert.encoder.layer.1.attention.self.query" in found.int8_layers
    assert parity.compare(model, Session(done.path), [inputs("bert", seed=4)])["max_abs_diff"] < 1e-5
    small = tmp_path / "small"
    small.mkdir()
    done = convert.write(model, inputs("bert"), small, embeddings="int8")
    table = model.get_input_embeddings().weight.numel()
    assert facts(done.path).weight_types["int8"] - found.weight_types["int8"] >= table
    assert parity.compare(model, Session(done.path), [inputs("bert", seed=4)])["max_abs_diff"] < 1e-5, "its own tables"


@pytest.mark.long
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_are_multiplied_as_integers_and_rows_looked_up(tmp_path, symmetric):
    model = tiny("llama")
    settings = WeightOnly(mode="weight_only", method="rtn", bits=4, block_size=16, symmetric=symmetric)
    weight_only.compress(model, settings, [])
    done = convert.write(model, inputs("llama"), tmp_path)
    graph = ir.load(done.path).graph
    kinds = [node.op_type for node in graph.all_nodes()]
    assert kinds.count("MatMulNBits") >= 14 and "DequantizeLinear" not in kinds
    zeros = [len(node.inputs) == 4 for node in graph.all_nodes() if node.op_type == "MatMulNBits"]
    assert sum(zeros) == (0 if symmetric else len(zeros) - 1), "the head has 8 bits and none"
    table = next(
        node.inputs[0] for node in graph.all_nodes() if node.op_type == "Gather" and "embed" in node.inputs[0].name
    )
    assert table.dtype in (ir.DataType.INT8, ir.DataType.UINT8)
    assert parity.compare(model, Session(done.path), [inputs("llama", seed=2)])["max_abs_diff"] < 1e-5


def test_a_tied_head_is_stored_once(tmp_path):
    model = tiny("gpt2")
    settings = WeightOnly(
        mode="weight_only", method="rtn", bits=8, granularity="channel", embeddings="same", lm_head="same"
    )
    weight_only.compress(model, settings, [])
    assert any("lm_head" in name for name in records.of(model))
    done = convert.write(model, inputs("gpt2"), tmp_path)
    assert parity.compare(model, Session(done.path), [inputs("gpt2", seed=2)])["max_abs_diff"] < 1e-5
    sizes = facts(done.path).weight_types
    assert sizes.get("float", 0) < 0.2 * sum(sizes.values()), sizes


def test_weights_that_are_too_many_for_a_file_stand_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "LARGEST", 1000)
    done = convert.write(tiny("bert"), inputs("bert"), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert done.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert parity.compare(tiny("bert"), Session(done.path), [inputs("bert", seed=2)])["max_abs_diff"] < 1e-5


def test_free_axes_have_the_words_of_the_signature(tmp_path):
    graph = ir.load(convert.write(tiny("bert"), inputs("bert"), tmp_path).path).graph
    assert [[str(axis) for axis in value.shape] for value in graph.inputs] == [["batch", "tokens"]] * len(graph.inputs)
    assert str(graph.outputs[0].shape[0]) == "batch"


def test_what_cannot_be_is_said(tmp_path):
    with pytest.raises(UserError, match=r"model\.float\(\)"):
        convert.write(tiny("bert").bfloat16(), inputs("bert"), tmp_path)

    class Odd(nn.Module):
        def forward(self, x):
            return {"logits": x if x.sum() > 0 else -x}

    with pytest.raises(ExportError, match="depends on the values of its inputs"):
        convert.write(Odd(), X, tmp_path, signature=Signature((Port("x", (BATCH, 8)),), (Port("logits", (BATCH, 8)),)))
    assert not list(tmp_path.iterdir())


def test_four_bits_are_packed_low_half_first():
    assert _packed(np.array([[1, 2, 3]], np.uint8), 4).tolist() == [[0x21, 0x03]]


def test_all_operations_that_onnx_lacks_are_named_at_once(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return {"logits": torch.special.bessel_j0(x) + torch.special.zeta(x.abs() + 2, 1.0) + x}

    signature = Signature((Port("x", (BATCH, 8)),), (Port("logits", (BATCH, 8)),))
    for work in (
        lambda: convert.write(Odd(), X, tmp_path, signature=signature),
        lambda: convert.check_convertible(Odd(), X, signature, cached=False),
    ):
        with pytest.raises(ExportError, match=r"Odd has operations that ONNX lacks: .*bessel_j0\S*, \S*zeta"):
            work()
    convert.check_convertible(Loud(), X, SIGNATURE, cached=False)
    assert not list(tmp_path.iterdir())


def writer():
    """A BART whose encoder gives values that fp16 does not hold."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 50, "max_position_embeddings": 40}
    sizes |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    model = t.BartForConditionalGeneration(t.BartConfig(**sizes, init_std=0.2, use_cache=False)).eval()
    with torch.no_grad():
        for layer in (model.model.encoder.layers[0], model.model.decoder.layers[0]):
            layer.fc1.weight[:2] *= 1e5
            layer.fc2.weight[:, :2] *= 1e-5
    return model


def read_and_written(seed, rows=3, tokens=9, written=5):
    draw = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[0, -3:] = 0
    ids = {"input_ids": torch.randint(4, 50, (rows, tokens), generator=draw), "attention_mask": mask}
    return {**ids, "decoder_input_ids": torch.randint(4, 50, (rows, written), generator=draw)}


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_encoder_and_a_decoder_are_a_file_each(precision, tmp_path):
    model = writer()
    batch = read_and_written(0)
    done = convert.write(model, batch, tmp_path, precision=precision, calibration=[batch])
    assert {file.name for file in tmp_path.iterdir()} == {"encoder_model.onnx", "decoder_model.onnx"}
    assert done.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    decoder, runner = Session(done.path), opened(done.path)
    assert list(decoder.inputs) == ["input_ids", "encoder_attention_mask", "encoder_hidden_states"]
    with torch.no_grad():
        for other in (read_and_written(1), read_and_written(2, rows=1, tokens=4, written=1)):
            expected = model(**other).logits.numpy()
            apart = np.abs(runner(other)["logits"] - expected).max() / np.abs(expected).max()
            assert apart < (1e-5 if precision == "fp32" else 2e-2)
    found = runner.facts()
    assert found.fused_attention == found.attention_layers == 3 and len(found.fused_nodes) == 3
    if precision == "fp16":
        kept = done.half["kept_fp32"]
        assert {name.partition(":")[0] for name in kept} == {"encoder_model.onnx", "decoder_model.onnx"}
        assert 4 <= found.float_casts <= 12 and done.half["executed"]["finite"]


@pytest.mark.long
def test_compressed_weights_of_encoder_and_decoder_are_stored_in_both(tmp_path):
    model = writer()
    weight_only.compress(model, WeightOnly(mode="weight_only", method="rtn", block_size=16), [])
    done = convert.write(model, read_and_written(0), tmp_path)
    kinds = Counter(n.op_type for file in tmp_path.iterdir() for n in ir.load(file).graph.all_nodes())
    assert kinds["MatMulNBits"] == 6 + 10 + 1
    assert parity.compare(model, opened(done.path), [read_and_written(3)])["max_abs_diff"] < 1e-4
    (tmp_path / "encoder_model.onnx").unlink()
    with pytest.raises(ExportError, match=r"is a decoder, and encoder_model\.onnx is not beside it"):
        opened(done.path)


@pytest.mark.long
def test_both_files_of_a_quantized_model_quantize_what_its_layers_read(tmp_path):
    """The quantizers act in the forward of the whole model."""
    batch = read_and_written(0)
    model = quantizers.quantize(writer(), Qat(mode="qat"), [batch])
    convert.write(model, batch, tmp_path)
    for file in tmp_path.iterdir():
        kinds = Counter(node.op_type for node in ir.load(file).graph.all_nodes())
        # of the decoder what reads the encoder's output: its quantizer stands at the end of the encoder
        assert kinds["QuantizeLinear"] >= 4 and kinds["MatMulNBits"] == (2 if "decoder" in file.name else 0), file.name


@pytest.mark.long
def test_external_data_moves_with_its_file(tmp_path, monkeypatch, capsys):
    """And a file without it is refused by name."""
    monkeypatch.setattr(convert, "LARGEST", 1000)
    mptrain.save(tiny("bert"), tmp_path / "model")
    words = ["export", str(tmp_path / "model"), "--to", str(tmp_path / "out"), "--format", "onnx", "--samples", "4"]
    assert main(words) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "model.onnx.data").is_file()
    (tmp_path / "out").rename(tmp_path / "moved")
    assert main(["verify", str(tmp_path / "moved")]) == 0, capsys.readouterr().err
    (tmp_path / "moved" / "model.onnx.data").unlink()
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "moved")]) == 1
    assert "model.onnx: onnxruntime" in (said := " ".join(capsys.readouterr().err.split())) and ".data" in said
