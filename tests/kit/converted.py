"""A function of one tensor, exported to a format in fp32 and computed there."""

from __future__ import annotations

import openvino as ov
import torch
from torch import nn

from mptrain.core.signature import Port, Signature
from mptrain.export.coreai.convert import converted, traced
from mptrain.export.coreai.runner import Asset
from mptrain.export.coreml.convert import convert as to_coreml
from mptrain.export.onnx.convert import write as to_onnx
from mptrain.export.onnx.runner import Session
from mptrain.export.openvino.convert import convert as to_openvino
from mptrain.mil.interpreter import Interpreter
from mptrain.recipe import CoreMlShapes


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, **inputs):
        (x,) = inputs.values()
        return {"y": self.function(x)}


def signature(inputs, outputs=("y",)):
    """All sizes fixed, but the batch of what keeps it."""
    return Signature(
        tuple(Port(name, tuple(x.shape)) for name, x in inputs.items()), tuple(Port(n, ()) for n in outputs)
    )


def coreml(model, inputs, folder, route="export"):
    package = folder / "model.mlpackage"
    shapes = CoreMlShapes(kind="ranged", batch=[1], length=[1])
    to_coreml(model, inputs, shapes=shapes, route=route, signature=signature(inputs)).model.save(str(package))
    return Interpreter(package)(inputs)["y"]


def coreml_trace(model, inputs, folder):
    return coreml(model, inputs, folder, "trace")


def coreai(model, inputs, folder):
    graph = traced(model, inputs, signature(inputs), shapes="fixed")
    converted(graph, model, list(inputs), ["y"]).save_asset(folder / "model.aimodel")
    runner = Asset(folder / "model.aimodel")
    try:
        return runner(inputs)["y"]
    finally:
        runner.close()


def openvino(model, inputs, folder):
    graph = to_openvino(model, inputs, signature(inputs))
    compiled = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([value.numpy() for value in inputs.values()])[0]


def onnx(model, inputs, folder):
    done = to_onnx(model, inputs, folder, signature=signature(inputs))
    return Session(done.path)(inputs)["y"]


ROUTES = {"coreml": coreml, "coreml trace": coreml_trace, "coreai": coreai, "openvino": openvino, "onnx": onnx}


def computed(route, function, x, folder):
    name = "pixel_values" if x.dim() == 4 else "x"
    found = ROUTES[route](Function(function).eval(), {name: x}, folder)
    return torch.as_tensor(found.copy())


def same(expected, found):
    """To 1e-5 of the largest value, and NaN and infinity where they are expected."""
    if expected.shape != found.shape or not torch.equal(expected.isfinite(), found.isfinite()):
        return False
    known = expected.isfinite()
    a, b = expected[known].double(), found[known].double()
    return not a.numel() or float((a - b).abs().max()) <= 1e-5 * max(1.0, float(a.abs().max()))
