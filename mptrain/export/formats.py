"""The formats: one line to each."""

from __future__ import annotations

from importlib import import_module

from mptrain.export.base import Format
from mptrain.recipe import ExportSpec

FORMATS = {
    "openvino": "mptrain.export.openvino.format:OpenVinoFormat",
    "coreml": "mptrain.export.coreml.format:CoreMlFormat",
    "coreai": "mptrain.export.coreai.format:CoreAiFormat",
    "onnx": "mptrain.export.onnx.format:OnnxFormat",
}
"""by the name of a spec, the class of its Format: imported when it is used"""


def format_of(spec: ExportSpec) -> Format:
    module, _, name = FORMATS[spec.format].partition(":")
    return getattr(import_module(module), name)(spec)
