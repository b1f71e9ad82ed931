import itertools
import re

import pytest
import torch
from coreai.authoring.asset import AIModelAsset
from kit.long import except_for
from kit.tiny_models import inputs, tiny
from torch import nn
from transformers import PretrainedConfig

from mptrain.core.errors import ExportError
from mptrain.core.signature import probed
from mptrain.export.coreai.convert import export_coreai, traced
from mptrain.export.coreai.runner import Asset
from mptrain.report.words import kept_in_fp32
from mptrain.verify import overflow
from mptrain.verify.outputs import rows
from mptrain.verify.programs.exported import GraphOps, with_copies


def operations(model, batch, batches):
    signature = probed(model, batch)
    program = traced(model, batch, signature)
    return program, GraphOps(program, list(batch), ["logits"], batches, signature)


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
            expected = rows(model(**b), b, probed(model, b))
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


def softplus(x):
    """x up to 30; exp overflows fp16 from 11.1 on, the result does not."""
    return torch.log(1 + torch.exp(15 + 15 * torch.sin(x)))


def softplus_of_torch(x):
    """Decomposed, with x itself where it is above 20."""
    return nn.functional.softplus(15 + 15 * torch.sin(x))


def log1p_of_exp(x):
    return torch.log1p(torch.exp(6 * x.abs() + 9)) / 20


def softmax_without_its_maximum(x):
    e = torch.exp(15 + 4 * torch.tanh(x))
    return e / e.sum(-1, keepdim=True)


def two_readers(x):
    """One value, read by two kept operations and by one in fp16."""
    y = 300 * torch.tanh(x)
    first, second = (y * y).sum(-1, keepdim=True), ((y + 1) * (y + 1)).mean(-1, keepdim=True)
    return (torch.sqrt(first) + torch.sqrt(second) + y) / 300


def mask_by_an_integer(x):
    """Above 65504 it is inf in fp16, and 0 · inf is NaN."""
    return torch.softmax(x + (1 - (x > 0).float()) * -1_000_000, -1)


# Of each: what no fp16 asset is right without, its casts, and whether the plain one has NaN or inf.
OVERFLOWS = {
    rms: (["add", "mean", "pow", "rsqrt"], 2, False),
    softplus: (["add", "exp", "log"], 2, True),
    log1p_of_exp: (["exp", "log1p"], 2, True),
    softmax_without_its_maximum: (["div", "exp", "sum"], 2, True),
    softplus_of_torch: (["exp", "log1p"], 2, True),
    two_readers: (["mean", "mul", "mul", "sqrt", "sum"], 4, True),
    mask_by_an_integer: (["mul"], 2, True),
}


def casts_in(asset):
    """Conversions between float and half, counted in the text of the file's program."""
    program = AIModelAsset.load(asset).program
    lines = [str(op) for op in program._get_graph("main").bodyRegion.blocks[0].operations]
    ends = [re.search(r"coreai\.cast .*?(f16|f32)> to .*?(f16|f32)>", line) for line in lines]
    return sum(found is not None and found[1] != found[2] for found in ends)


def difference(model, asset, batch):
    with torch.no_grad():
        return overflow.compare(model(**batch), {"logits": torch.from_numpy(Asset(asset)(batch)["logits"])})


@pytest.mark.parametrize("function", except_for(OVERFLOWS, list(OVERFLOWS)[:2]))
def test_an_fp16_asset_keeps_the_fewest_operations_in_fp32_with_the_fewest_casts(function, tmp_path):
    torch.manual_seed(0)
    model, (expected, casts, broken) = Net(function).eval(), OVERFLOWS[function]
    batches = [{"pixel_values": 2 * torch.randn(3, 8)}, {"pixel_values": torch.randn(2, 8)}]
    plain = export_coreai(model, batches[0], tmp_path / "plain", precision="fp16")
    naive = overflow.worst(difference(model, plain.asset, batch) for batch in batches)
    assert not naive.right() and naive.finite != broken, "plain fp16 is wrong"
    done = export_coreai(model, batches[0], tmp_path / "out", precision="fp16", calibration=batches)
    _, ops = operations(model, batches[0], batches)
    kinds = {op.name: op.kind for op in ops.ops}
    kept = done.half["kept_fp32"]
    assert sorted(kinds[name] for name in kept) == expected
    assert all(difference(model, done.asset, batch).right(0.02) for batch in batches)
    assert (casts_in(done.asset), done.half["float_casts"]) == (casts, casts)
    ops_said = f"{len(kept)} op{'s' * (len(kept) > 1)} in fp32: {', '.join(kept)}"
    assert kept_in_fp32(done.half) == f"{ops_said}; {casts} float↔half casts"
    reference = [ops.run(i, kinds) for i in range(2)]
    for size in range(len(kept) + 1):  # brute force
        for some in itertools.combinations(kinds, size):
            right = all(overflow.compare(reference[i], ops.run(i, some)).right() for i in range(2))
            assert not right or len(some) == len(kept), f"{some} are enough"


def test_a_finfo_min_mask_is_right_in_fp16(tmp_path):
    """Core AI's cast makes it -65504."""
    torch.manual_seed(0)
    model, batch = Net(mask_by_multiplication).eval(), {"pixel_values": 3 * torch.randn(3, 8)}
    done = export_coreai(model, batch, tmp_path / "out", precision="fp16", calibration=[batch])
    assert (done.half["kept_fp32"], done.half["float_casts"], casts_in(done.asset)) == ({}, 0, 0)
    assert done.half["all_half"]["cosine"] > 0.9999 and difference(model, done.asset, batch).right()


@pytest.mark.parametrize("calibrated", [True, False])
def test_what_the_cast_itself_leaves_in_fp32_is_said(calibrated, tmp_path):
    """A factor above 65504: the product is small, so the search has no need of it."""
    torch.manual_seed(0)
    model, batch = Net(lambda x: 70000.0 * (0.4 * torch.tanh(x)) / 3e4).eval(), {"pixel_values": torch.randn(3, 8)}
    done = export_coreai(model, batch, tmp_path / "out", precision="fp16", calibration=[batch] if calibrated else [])
    assert [name.split("_")[0] for name in done.half["kept_fp32"]] == ["mul"]
    assert set(done.half["kept_fp32"].values()) == {"reads a number that fp16 does not hold"}
    assert (casts_in(done.asset), done.half["float_casts"]) == (2, 2)


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
