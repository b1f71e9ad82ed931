"""What a run needs of an export format: write a variant, run it again, and say what is in it.

A format is made from its entry in the recipe (`format_of`) and imports its runtime only then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from mptrain.compress.quantize import quantizers
from mptrain.core.silence import import_unreported
from mptrain.recipe import CoreAi, CoreMl, ExportSpec, OpenVino, Stage

if TYPE_CHECKING:
    from mptrain.export.coreml.convert import Exported

log = logging.getLogger(__name__)

ACTIVATIONS = (
    "the fake quantizers of activations: the package computes in floating point with the integers of the weights;"
    " its operations on 8-bit activations exist on few devices and have not been run"
)
Forward = Callable[[Mapping[str, Tensor | np.ndarray]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Written:
    """path: of the file or folder that holds the model; size_bytes: of the model alone; notes: JSON facts."""

    path: Path
    size_bytes: int
    facts: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """What a file was written from, for a format that cannot run every file on every host. facts: of `Written`."""

    model: Callable[[], PreTrainedModel]
    example: Mapping[str, Tensor]
    precision: str
    facts: Mapping[str, Any]


class Format(Protocol):
    """timed: whether the time of its runner says something about the runtime that the format is for.

    package: what must be installed; of an extra of mptrain.
    """

    timed: bool
    package: str

    def model(self, model: PreTrainedModel, precision: str, stage: Stage) -> PreTrainedModel:
        """The torch model that is written, and that the exported one is compared with."""
        ...

    def write(
        self,
        model: PreTrainedModel,
        example: Mapping[str, Tensor],
        folder: Path,
        *,
        precision: str,
        stage: Stage,
        calibration: Callable[[], list[dict[str, Tensor]]],
        processor: Any,
    ) -> Written:
        """calibration: gives batches of training inputs, for what has to see real values."""
        ...

    def runner(self, path: Path, source: Source, threads: int | None = None) -> Forward: ...

    def facts(self, runner: Forward) -> dict[str, Any]:
        """JSON facts read from the exported file or the compiled model."""
        ...


FORMATS = {
    "openvino": "mptrain.export.formats:OpenVinoFormat",
    "coreml": "mptrain.export.formats:core_ml",
    "coreai": "mptrain.export.formats:core_ai",
}
"""by the name of a spec, what makes its Format from its entry in a recipe: imported when it is used"""


def format_of(spec: ExportSpec) -> Format:
    module, _, name = FORMATS[spec.format].partition(":")
    return getattr(import_module(module), name)(spec)


def core_ml(spec: CoreMl) -> Format:
    return CoreMlFormat(spec) if spec.cache is None else CachedCoreMlFormat(spec, spec.cache)


def core_ai(spec: CoreAi) -> Format:
    return CoreAiFormat(spec) if spec.cache is None else CachedCoreAiFormat(spec, spec.cache)


def stored_weights(model: PreTrainedModel, stage: Stage) -> PreTrainedModel:
    """A quantized stage as targets take it that store weights alone: with the integers its fake quantizers learned.

    Embeddings, which have no fake quantizers, get int8 and one scale to a row where the stage says int8.
    """
    if not quantizers.is_quantized(model):
        return model
    from mptrain.compress.quantize.integers import weight_only

    whole = stage.quantize is not None and stage.quantize.embeddings == "int8"
    return cast(PreTrainedModel, weight_only(model, embeddings="int8" if whole else "fp32"))


class OpenVinoFormat:
    timed = True
    package = "openvino"

    def __init__(self, spec: OpenVino):
        import_unreported("openvino")

    def model(self, model: PreTrainedModel, precision: str, stage: Stage) -> PreTrainedModel:
        plain = precision in ("fp32", "fp16")
        return quantizers.detach(model)[0] if plain and quantizers.is_quantized(model) else model

    def write(
        self,
        model: PreTrainedModel,
        example: Mapping[str, Tensor],
        folder: Path,
        *,
        precision: Any,
        stage: Stage,
        calibration: Callable[[], list[dict[str, Tensor]]],
        processor: Any,
    ) -> Written:
        from mptrain.export.openvino.convert import export_openvino

        embeddings = stage.quantize.embeddings if stage.quantize is not None else "fp32"
        done = export_openvino(
            model,
            example,
            folder,
            precision=precision,
            embeddings=embeddings,
            calibration=calibration() if precision == "fp16" else (),
            processor=processor,
        )
        return Written(done.xml, done.size_bytes, {} if done.half is None else {"half": done.half})

    def runner(self, path: Path, source: Source, threads: int | None = None) -> Forward:
        from mptrain.export.openvino.convert import Runner

        return Runner(path, threads)

    def facts(self, runner: Any) -> dict[str, Any]:
        from mptrain.export.openvino import facts as graph

        return graph.facts(runner)


class CoreMlFormat:
    """Scores come from the reference interpreter, which runs anywhere: no times."""

    timed = False
    package = "coremltools"

    def __init__(self, spec: CoreMl):
        self.spec = spec

    def model(self, model: PreTrainedModel, precision: str, stage: Stage) -> PreTrainedModel:
        return stored_weights(model, stage)

    def write(
        self,
        model: PreTrainedModel,
        example: Mapping[str, Tensor],
        folder: Path,
        *,
        precision: Any,
        stage: Stage,
        calibration: Callable[[], list[dict[str, Tensor]]],
        processor: Any,
    ) -> Written:
        how: dict[str, Any] = {
            "precision": precision,
            "target": self.spec.minimum_deployment_target,
            "scaled_tables": self.spec.scaled_tables,
            "calibration": calibration() if precision == "fp16" else (),
            "processor": processor,
        }
        done = self._export(model, example, folder, **how)
        found: dict[str, Any] = {"stored_as_floats": done.floats}
        if stage.quantize is not None:
            found["dropped"] = ACTIVATIONS
        return Written(done.package, done.size_bytes, found if done.half is None else found | {"half": done.half})

    def _export(self, model: PreTrainedModel, example: Mapping[str, Tensor], folder: Path, **how: Any) -> Exported:
        from mptrain.export.coreml.convert import export_coreml

        return export_coreml(model, example, folder, shapes=self.spec.shapes, route=self.spec.route, **how)

    def runner(self, path: Path, source: Source, threads: int | None = None) -> Forward:
        from mptrain.mil.interpreter import Interpreter
        from mptrain.mil.padded import Padded

        return Padded(Interpreter(path))

    def facts(self, runner: Any) -> dict[str, Any]:
        from mptrain.mil.facts import facts

        return facts(runner.interpreter.program)


class CachedCoreMlFormat(CoreMlFormat):
    """With a key-value cache of `cache` tokens; texts go in piece by piece."""

    def __init__(self, spec: CoreMl, cache: int):
        super().__init__(spec)
        self.cache = cache

    def write(self, *args: Any, **kwargs: Any) -> Written:
        written = super().write(*args, **kwargs)
        return replace(written, facts={"cache": self.cache, "cache_precision": "fp16"} | written.facts)

    def _export(self, model: PreTrainedModel, example: Mapping[str, Tensor], folder: Path, **how: Any) -> Exported:
        from mptrain.export.coreml.cached import export_decoder

        return export_decoder(model, folder, max_length=self.cache, **how)

    def runner(self, path: Path, source: Source, threads: int | None = None) -> Forward:
        from mptrain.export.torch.texts import Texts
        from mptrain.mil.interpreter import Interpreter

        return Texts(Interpreter(path), tokens=self.cache, max_length=self.cache)

    def facts(self, runner: Any) -> dict[str, Any]:
        from mptrain.mil.facts import facts

        return facts(runner.runner.program)


class CoreAiFormat:
    """Scores come from the asset itself, executed on the host's CPU; times there say nothing about a device.

    On a CPU without fp16 arithmetic fp16 assets are executed on two examples and scored by emulation.
    """

    timed = False
    package = "coreai"

    def __init__(self, spec: CoreAi):
        self.spec = spec

    def model(self, model: PreTrainedModel, precision: str, stage: Stage) -> PreTrainedModel:
        return stored_weights(model, stage)

    def write(
        self,
        model: PreTrainedModel,
        example: Mapping[str, Tensor],
        folder: Path,
        *,
        precision: Any,
        stage: Stage,
        calibration: Callable[[], list[dict[str, Tensor]]],
        processor: Any,
    ) -> Written:
        from mptrain.export.coreai.convert import export_coreai
        from mptrain.export.coreai.emulated import computes_half

        batches, few = (calibration(), not computes_half()) if precision == "fp16" else ((), False)
        if few:
            log.info("this CPU computes fp16 in software: the asset is executed on 2 examples and scored by emulation")
        done = export_coreai(
            model, example, folder, precision=precision, calibration=batches, few=few, processor=processor
        )
        return Written(done.asset, done.size_bytes, {} if done.half is None else {"half": dict(done.half)})

    def runner(self, path: Path, source: Source, threads: int | None = None) -> Forward:
        from mptrain.export.coreai.convert import Runner
        from mptrain.export.coreai.emulated import EmulatedAsset, computes_half

        if source.precision == "fp16" and not computes_half():
            return EmulatedAsset(path, source.model(), source.example, source.facts["half"]["kept_fp32"])
        return Runner(path)

    def facts(self, runner: Any) -> dict[str, Any]:
        from mptrain.export.coreai.facts import facts

        return facts(runner)


class CachedCoreAiFormat(CoreAiFormat):
    """With a key-value cache of `cache` tokens, in fp32; texts go in token by token."""

    def __init__(self, spec: CoreAi, cache: int):
        super().__init__(spec)
        self.cache = cache

    def write(
        self, model: PreTrainedModel, example: Mapping[str, Tensor], folder: Path, *, processor: Any, **_: Any
    ) -> Written:
        from mptrain.export.coreai.cached import export_decoder

        done = export_decoder(model, folder, max_length=self.cache, processor=processor)
        return Written(done.asset, done.size_bytes, {"cache": self.cache, "cache_precision": "fp32"})

    def runner(self, path: Path, source: Source, threads: int | None = None) -> Forward:
        from mptrain.export.coreai.convert import Runner
        from mptrain.export.torch.texts import Texts

        return Texts(Runner(path), tokens=1, max_length=self.cache)

    def facts(self, runner: Any) -> dict[str, Any]:
        return super().facts(runner.runner)
