"""The exports: a file to each format, and here the table of them, a line to each."""

from __future__ import annotations

from typing import Annotated

from mptrain.recipe.base import OneOf
from mptrain.recipe.exports.base import ExportSpec
from mptrain.recipe.exports.coreai import CoreAi
from mptrain.recipe.exports.coreml import CoreMl
from mptrain.recipe.exports.onnx import Onnx
from mptrain.recipe.exports.openvino import OpenVino

EXPORTS: dict[str, type[ExportSpec]] = {
    "openvino": OpenVino,
    "coreml": CoreMl,
    "coreai": CoreAi,
    "onnx": Onnx,
}


def spec_of(name: str) -> type[ExportSpec]:
    """The spec of a format by its name; of one that this process does not know, the class that knows nothing."""
    return EXPORTS.get(name, ExportSpec)


Export = Annotated[ExportSpec, OneOf("format", EXPORTS)]
