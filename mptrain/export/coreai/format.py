"""Core AI assets as a format of the flow, with or without a key-value cache."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from mptrain.core.signature import Batch, Signature
from mptrain.export.base import Embeddings, Runner, Source, Written, tried
from mptrain.export.facts import PIECES, Facts
from mptrain.export.torch.stored_weights import DROPPED, stored_weights
from mptrain.recipe import CoreAi

log = logging.getLogger(__name__)


class CoreAiFormat:
    """Scores come from the asset itself, executed on the host's CPU; times there say nothing about a device.

    On a CPU without fp16 arithmetic fp16 assets are executed on two examples and scored by emulation.
    """

    def __init__(self, spec: CoreAi):
        self.spec = spec

    def torch(self, model: nn.Module, precision: str, embeddings: Embeddings) -> nn.Module:
        return stored_weights(model, embeddings)

    def write(self, source: Source, folder: Path) -> Written:
        from mptrain.export.coreai.cached import write_decoder
        from mptrain.export.coreai.convert import write
        from mptrain.export.coreai.emulated import computes_half

        dropped = DROPPED if source.quantized else None
        if self.spec.cache is not None:
            done = write_decoder(source.model, folder, max_length=self.spec.cache)
            facts = Facts(cache=self.spec.cache, cache_precision="fp32", cache_fed=PIECES, dropped=dropped)
            return Written(done.asset, done.size_bytes, facts)
        half = source.precision == "fp16"
        few = half and not computes_half()
        if few:
            log.info("this CPU computes fp16 in software: the asset is executed on 2 examples and scored by emulation")
        done = write(
            source.model,
            source.example,
            folder,
            precision="fp16" if half else "fp32",
            calibration=source.calibration() if half else (),
            few=few,
            signature=source.signature,
        )
        return Written(done.asset, done.size_bytes, Facts(half=done.half, dropped=dropped))

    def check(self, model: nn.Module, example: Batch, signature: Signature) -> None:
        tried(self, model, example, signature)

    def open(self, path: Path, source: Source, threads: int | None = None) -> Runner:
        from mptrain.export.coreai.emulated import EmulatedAsset, computes_half
        from mptrain.export.coreai.runner import Asset, CachedAsset

        if self.spec.cache is not None:
            return CachedAsset(path, self.spec.cache)
        if source.precision == "fp16" and not computes_half():
            kept = (source.written.half or {})["kept_fp32"]
            return EmulatedAsset(path, source.model, source.example, kept, source.signature)
        return Asset(path)
