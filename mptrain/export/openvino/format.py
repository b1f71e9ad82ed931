"""OpenVINO IR as a format of the flow, with or without a key-value cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import nn

from mptrain.compress.quantize import quantizers
from mptrain.core.signature import Batch, Signature
from mptrain.core.silence import import_unreported
from mptrain.export.base import Embeddings, Runner, Source, Written
from mptrain.export.facts import WHOLE, Facts
from mptrain.measure.throughput import Stream
from mptrain.recipe import OpenVino


class OpenVinoFormat:
    def __init__(self, spec: OpenVino):
        self.spec = spec
        import_unreported("openvino")

    def torch(self, model: nn.Module, precision: str, embeddings: Embeddings) -> nn.Module:
        return quantizers.plain(model) if self.spec.drops_quantizers(precision) else model

    def write(self, source: Source, folder: Path) -> Written:
        from mptrain.export.openvino.write import write

        done = write(
            source.model,
            source.example,
            folder,
            precision=cast(Any, source.precision),
            embeddings=source.embeddings,
            calibration=source.calibration() if source.precision == "fp16" else (),
            signature=source.signature,
            cache=self.spec.cache,
        )
        facts = Facts(half=done.half, more={} if done.left is None else {"left_in_float": done.left})
        if self.spec.cache is not None:
            facts |= Facts(cache=self.spec.cache, cache_precision="fp32", cache_fed=WHOLE)
        return Written(done.xml, done.size_bytes, facts)

    def check(self, model: nn.Module, example: Batch, signature: Signature) -> None:
        from mptrain.export.openvino.convert import check_lengths

        check_lengths(model, example, signature)

    def open(self, path: Path, source: Source, threads: int | None = None) -> Runner:
        from mptrain.export.openvino.runner import CachedIr, CompiledIr, keeps_state

        if self.spec.cache is not None or keeps_state(path):  # a file alone does not say how it was asked for
            return CachedIr(path, self.spec.cache, threads, precision=self.spec.hint)
        return CompiledIr(path, threads, precision=self.spec.hint)

    def stream(self, path: Path, source: Source, threads: int) -> Stream:
        from mptrain.export.openvino.stream import IrStream

        return IrStream(path, threads, self.spec.hint)
