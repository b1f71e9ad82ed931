"""What a budget in time or bytes counts: the variant that a stage's model ends as.

quantized   the first variant after the stage whose activations are quantized, in this stage or a later one
else        the first that is not stored as integers or tables, in fp32: fp16 files compute in fp32 on most CPUs
stand-in    OpenVINO, where the variants run in no runtime of this host, or there are none
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mptrain.core.errors import RecipeError
from mptrain.recipe.exports import OpenVino
from mptrain.recipe.exports.base import ExportSpec
from mptrain.recipe.method import MethodConfig
from mptrain.recipe.plan import Planned, variants
from mptrain.recipe.recipe import Recipe
from mptrain.recipe.stage import Stage
from mptrain.recipe.weights import stored_embeddings


@dataclass(frozen=True)
class Target:
    """export: without heads and cache. quantize: settings of the quantizers that the model has or will get; None, it
    stays in floating point. threads: of a call."""

    export: ExportSpec
    precision: str
    quantize: MethodConfig | None
    threads: int | Literal["all"]

    @property
    def embeddings(self) -> Literal["fp32", "int8"]:
        return stored_embeddings(self.quantize)

    @property
    def bytes(self) -> tuple[float, float]:
        """Of a weight of a layer, and of an embedding."""
        learned = (None, None) if self.quantize is None else (1.0, 1.0 if self.embeddings == "int8" else None)
        return self.export.bytes_per_weight(self.precision, learned)


def target(recipe: Recipe, stage: Stage) -> Target:
    """Of a stage with a budget in latency or size. Raises RecipeError for the size of compressed weights."""
    after = [planned for planned in variants(recipe) if stage in recipe.chain(planned.stage)]
    floats = [planned for planned in after if not _compressed(recipe, planned, stage)]
    if after and not floats and any("bytes" in method.reads() for method in stage.methods):
        raise RecipeError(
            f"stages.{stage.id}.prune.keep.size: counts bytes of float and int8 exports, and {after[0].id} stores"
            " weights as integers or tables: give keep.encoder_params, or export the pruned stage as well."
        )
    threads = recipe.evaluate.latency.threads[0]
    quantized = [planned for planned in floats if _quantizer(recipe, planned) is not None]
    for planned in [*quantized, *floats]:
        if planned.export.timed:
            config = _quantizer(recipe, planned)
            export = planned.export.model_copy(
                update={"id": planned.export.format, "of": [], "heads": [], "cache": None}
            )
            return Target(export, planned.precision if config else "fp32", config, threads)
    return stand_in(next((_quantizer(recipe, planned) for planned in quantized), None), threads)


def stand_in(quantize: MethodConfig | None, threads: int | Literal["all"]) -> Target:
    """OpenVINO, for a model that no export of this host's is known of."""
    export = OpenVino(id="openvino", format="openvino", of=[])
    return Target(export, "fp32" if quantize is None else "int8", quantize, threads)


def quantizer(stages: Sequence[Stage]) -> MethodConfig | None:
    """The settings that leave quantizers of activations; the first."""
    methods = (method for stage in stages for method in stage.methods)
    return next((m for m in methods if any(weights.activations for _, weights in m.leaves())), None)


def _quantizer(recipe: Recipe, planned: Planned) -> MethodConfig | None:
    if planned.export.drops_quantizers(planned.precision):
        return None
    return quantizer(recipe.chain(planned.stage))


def _compressed(recipe: Recipe, planned: Planned, stage: Stage) -> bool:
    """Whether the stage or one after it leaves weights as integers or tables, without quantized activations."""
    chain = recipe.chain(planned.stage)
    later = chain[: chain.index(stage) + 1]
    return any(not weights.activations for one in later for _, weights in one.leaves())
