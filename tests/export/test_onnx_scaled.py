"""Products that fp16 would break: with scaled channels in it, right, and left alone where it does not hold them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from mptrain.core.signature import BATCH, Port, Signature
from mptrain.export.onnx import convert, scaled
from mptrain.export.onnx.facts import facts
from mptrain.export.onnx.runner import Session
from mptrain.report.words import kept_in_fp32

X = {"x": torch.randn(16, 24, generator=torch.Generator().manual_seed(1))}
SIGNATURE = Signature((Port("x", (BATCH, 24)),), (Port("y", (BATCH, 8)),))


class Loud(nn.Module):
    """Two of the 32 channels between pass 65504; added: by a Linear's MatMul and Add, or by a Gemm."""

    def __init__(self, gemm: bool, quiet: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gemm = gemm
        self.up, self.down = nn.Linear(24, 32), nn.Linear(32, 8)
        with torch.no_grad():
            self.up.weight[:2] *= 1e6
            self.down.weight[:, :2] /= 1e6
            self.down.weight[:, 2:] *= quiet

    def forward(self, x):
        def product(layer, value):
            return torch.addmm(layer.bias, value, layer.weight.t()) if self.gemm else layer(value)

        return {"y": product(self.down, torch.relu(product(self.up, x)))}


@pytest.mark.parametrize("gemm", [True, False])
def test_weights_of_what_stays_are_half_and_the_result_is_as_right(tmp_path, gemm):
    model = Loud(gemm).eval()
    done = convert.write(model, X, tmp_path, precision="fp16", calibration=[X], signature=SIGNATURE)
    assert len(done.half["kept_fp32"]) == 3 and len(done.half["scaled"]) == 2
    stored = {value.name: value.const_value for value in ir.load(done.path).graph.initializers.values()}
    assert all(c.dtype == ir.DataType.FLOAT16 for c in stored.values() if len(c.shape) == 2)
    # the product up: its result is enlarged in float32, the product down: reads it made smaller; y goes out
    assert facts(done.path).float_casts <= 4
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        exact = model(x)["y"].numpy()
        rounded = Loud(gemm).eval()(x.half().float())["y"].numpy()  # what fp16 inputs alone cost
    off = np.abs(Session(done.path)({"x": x})["y"] - exact).max() / np.abs(exact).max()
    assert off < max(3e-3, 4 * np.abs(rounded - exact).max() / np.abs(exact).max())
    assert "weights in fp16, channels scaled around them" in kept_in_fp32(done.half)


def test_powers_of_two_change_no_bit_in_float32():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 24)).astype(np.float32) * np.array([1e5] + [1.0] * 23, dtype=np.float32)
    weights = rng.standard_normal((24, 6)).astype(np.float32)
    graph, node = _product(weights)
    before = _run(graph, x)
    types, large = scaled.fit(graph.graph, [(node, (np.abs(x).max(0), np.abs(x @ weights).max(0)))])
    assert large == {node} and sorted(n.op_type for n in types) == ["MatMul", "Mul", "Mul"]
    assert np.array_equal(_run(graph, x), before)


def test_weights_that_fp16_rounds_away_stay_float32(tmp_path):
    # beside the loud channels others have weights that fp16 does not hold, and all that some outputs are made of
    model = Loud(True, quiet=1e-9).eval()
    with torch.no_grad():
        model.down.weight[3:, :2] = 0
    done = convert.write(model, X, tmp_path, precision="fp16", calibration=[X], signature=SIGNATURE)
    assert len(done.half["kept_fp32"]) == 3 and len(done.half["scaled"]) == 1


def _product(weights: np.ndarray) -> tuple[ir.Model, ir.Node]:
    """A model of one MatMul and an identity after it."""
    kept = ir.tensor(weights, name="w")
    constant = ir.Value(name="w", shape=kept.shape, type=ir.TensorType(scaled.FLOAT), const_value=kept)
    x = ir.Value(name="x", shape=ir.Shape(["b", weights.shape[0]]), type=ir.TensorType(scaled.FLOAT))
    node = ir.node("MatMul", [x, constant])
    last = ir.node("Identity", [node.outputs[0]])
    for value, name in ((node.outputs[0], "product"), (last.outputs[0], "y")):
        value.name, value.type = name, ir.TensorType(scaled.FLOAT)
        value.shape = ir.Shape(["b", weights.shape[1]])
    graph = ir.Graph(
        [x], list(last.outputs), nodes=[node, last], initializers=[constant], opset_imports={"": 18}, name="one"
    )
    return ir.Model(graph, ir_version=10), node


def _run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]
