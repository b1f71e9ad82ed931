import numpy as np
import pytest
import torch
from tiny_models import inputs, tiny
from torch import nn
from transformers import PretrainedConfig

from mptrain.errors import ExportError
from mptrain.export.coreai import Runner, export_coreai, traced
from mptrain.verify import overflow
from mptrain.verify.graph_ops import GraphOps, with_copies
from mptrain.verify.torch_ops import counted


def operations(model, batch, batches):
    program = traced(model, batch)
    return program, GraphOps(program, list(batch), ["logits"], batches)


def test_a_graph_kept_in_fp32_is_the_model_and_in_fp16_nearly():
    model, batch = tiny("bert"), inputs("bert", batch=2)
    batches = [inputs("bert", seed=1), inputs("bert", batch=5, seed=2)]
    _, ops = operations(model, batch, batches)
    assert ops.batches == 2
    names = {op.name for op in ops.ops}
    assert {op.kind for op in ops.ops} >= {"native_layer_norm", "scaled_dot_product_attention", "embedding", "tanh"}
    assert {op.module for op in ops.ops} >= {"bert.pooler.dense", "classifier", "bert.embeddings.LayerNorm"}
    assert all(source in names for op in ops.ops for source in op.inputs)
    with torch.no_grad():
        for i, b in enumerate(batches):
            expected = counted(model(**b), b)
            assert torch.allclose(ops.run(i, names)["logits"], expected["logits"], atol=1e-6)
            half = ops.run(i, ())["logits"]
            assert 0 < float((half - expected["logits"]).abs().max()) < 2e-3
    seen = []
    ops.run(0, (), lambda name, value: seen.append((name, torch.equal(value, value.half().float()))))
    assert {name for name, _ in seen} == names and all(rounded for _, rounded in seen)


class Net(nn.Module):
    """What transformers' models have, around a function."""

    def __init__(self, function):
        super().__init__()
        self.config, self.dtype = PretrainedConfig(), torch.float32
        self.linear, self.function = nn.Linear(8, 8), function

    def forward(self, pixel_values):
        return {"logits": self.function(self.linear(pixel_values))}


def rms(x, size=2000.0):
    x = size * x
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def mask_by_multiplication(x):
    mask = (x > 0).float()
    return torch.softmax(x + (1 - mask) * torch.finfo(torch.float32).min, -1)


def log_of_exp(x):
    return torch.log1p(torch.exp(6 * x.abs() + 9)) / 20


@pytest.mark.parametrize(("function", "kept"), [(rms, {"pow"}), (mask_by_multiplication, set()), (log_of_exp, {"exp"})])
def test_an_fp16_asset_keeps_what_overflows_in_fp32(function, kept, tmp_path):
    torch.manual_seed(0)
    model = Net(function).eval()
    batches = [{"pixel_values": torch.randn(3, 8)}, {"pixel_values": torch.randn(2, 8)}]
    done = export_coreai(model, batches[0], tmp_path / "out", precision="fp16", calibration=batches)
    assert {name.split("_")[0] for name in done.half["kept_fp32"]} >= kept
    assert len(done.half["kept_fp32"]) <= 4 and bool(kept) == bool(done.half["casts"])
    assert (done.half["all_half"]["cosine"] > 0.9999) == (not kept)
    assert min(done.half["kept"]["cosine"], done.half["executed"]["cosine"]) > 0.9999
    with torch.no_grad():
        expected = model(**batches[0])["logits"].numpy()
    found = Runner(done.asset)(batches[0])["logits"].astype(np.float32)
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()


def test_a_wrong_fp16_asset_is_not_written(tmp_path, monkeypatch):
    torch.manual_seed(0)
    batch = {"pixel_values": torch.randn(3, 8)}
    monkeypatch.setattr(overflow, "_tiers", lambda *_: [])  # a search that finds nothing
    with pytest.raises(ExportError, match="is wrong on the calibration batches"):
        export_coreai(Net(rms).eval(), batch, tmp_path / "out", precision="fp16", calibration=[batch])
    assert not list(tmp_path.iterdir())


def test_views_of_a_kept_operation_are_kept():
    def function(x):
        return (x * 70000.0)[:, None].transpose(1, 2).sum(-1) * 1e-5

    program, ops = operations(Net(function).eval(), {"pixel_values": torch.randn(3, 8)}, [])
    names = [op.name for op in ops.ops if op.kind == "mul"][:1]
    assert {name.split("_")[0] for name in with_copies(program, names)} >= {"mul", "unsqueeze", "permute"}
