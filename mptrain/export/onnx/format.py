"""ONNX as a format of the flow."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from mptrain.compress.quantize import quantizers
from mptrain.export.base import Embeddings, Runner, Source, Written
from mptrain.export.facts import Facts
from mptrain.export.torch.fits import check_fits
from mptrain.recipe.exports.onnx import OPSET, Onnx


class OnnxFormat:
    def __init__(self, spec: Onnx):
        self.spec = spec

    def torch(self, model: nn.Module, precision: str, embeddings: Embeddings) -> nn.Module:
        model = quantizers.plain(model) if self.spec.drops_quantizers(precision) else model
        check_fits(model, precision)
        return model

    def write(self, source: Source, folder: Path) -> Written:
        from mptrain.export.onnx.convert import write

        half = source.precision == "fp16"
        done = write(
            source.model,
            source.example,
            folder,
            precision="fp16" if half else "fp32",
            embeddings=source.embeddings,
            calibration=source.calibration() if half else (),
            signature=source.signature,
        )
        return Written(done.path, done.size_bytes, Facts(half=done.half, more={"opset": OPSET}))

    def open(self, path: Path, source: Source, threads: int | None = None) -> Runner:
        from mptrain.export.onnx.runner import Session

        return Session(path, threads)
