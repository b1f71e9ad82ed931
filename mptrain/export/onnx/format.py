"""ONNX as a format of the flow, with or without a key-value cache."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from mptrain.compress.quantize import quantizers
from mptrain.core.signature import Batch, Signature
from mptrain.export.base import Embeddings, Runner, Source, Written
from mptrain.export.facts import WHOLE, Facts
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
        from mptrain.export.onnx.recurrence import check_half

        half = source.precision == "fp16"
        if half:
            check_half(source.model)
        done = write(
            source.model,
            source.example,
            folder,
            precision="fp16" if half else "fp32",
            embeddings=source.embeddings,
            calibration=source.calibration() if half else (),
            signature=source.signature,
            cache=self.spec.cache,
        )
        facts = Facts(half=done.half, more={"opset": OPSET})
        if self.spec.cache is not None:
            facts |= Facts(cache=self.spec.cache, cache_fed=WHOLE)
        return Written(done.path, done.size_bytes, facts)

    def check(self, model: nn.Module, example: Batch, signature: Signature) -> None:
        from mptrain.export.onnx.convert import check_convertible
        from mptrain.export.onnx.recurrence import check_half

        if "fp16" in self.spec.precision:
            check_half(model)
        check_convertible(model, example, signature, cached=self.spec.cache is not None)

    def open(self, path: Path, source: Source, threads: int | None = None) -> Runner:
        from mptrain.export.onnx.runner import opened

        return opened(path, self.spec.cache, threads)
