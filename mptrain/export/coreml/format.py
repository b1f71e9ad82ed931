"""Core ML packages as a format of the flow, with or without a key-value cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from mptrain.core.signature import Batch, Signature
from mptrain.export.base import Embeddings, Runner, Source, Written, tried
from mptrain.export.facts import PIECES, Facts
from mptrain.export.torch.stored_weights import DROPPED, stored_weights
from mptrain.recipe import CoreMl


class CoreMlFormat:
    """Scores come from the reference interpreter, which runs anywhere: no times."""

    def __init__(self, spec: CoreMl):
        self.spec = spec

    def torch(self, model: nn.Module, precision: str, embeddings: Embeddings) -> nn.Module:
        return stored_weights(model, embeddings)

    def write(self, source: Source, folder: Path) -> Written:
        from mptrain.export.coreml.cached import convert_decoder
        from mptrain.export.coreml.convert import convert_checked, save

        how: dict[str, Any] = {
            "precision": source.precision,
            "target": self.spec.minimum_deployment_target,
            "scaled_tables": self.spec.scaled_tables,
            "calibration": source.calibration() if source.precision == "fp16" else (),
        }
        cache = self.spec.cache
        if cache is not None:
            converted = convert_decoder(source.model, max_length=cache, **how)
        else:
            converted = convert_checked(
                source.model,
                source.example,
                shapes=self.spec.shapes,
                route=self.spec.route,
                signature=source.signature,
                **how,
            )
        done = save(converted, folder)
        facts = Facts(
            half=done.half,
            dropped=DROPPED if source.quantized else None,
            cache=cache,
            cache_precision=None if cache is None else "fp16",
            cache_fed=None if cache is None else PIECES,
            more={"stored_as_floats": done.floats},
        )
        return Written(done.package, done.size_bytes, facts)

    def check(self, model: nn.Module, example: Batch, signature: Signature) -> None:
        tried(self, model, example, signature)

    def open(self, path: Path, source: Source, threads: int | None = None) -> Runner:
        from mptrain.export.coreml.runner import CachedPackage, Package

        cache = self.spec.cache
        return Package(path, source.signature) if cache is None else CachedPackage(path, cache)
