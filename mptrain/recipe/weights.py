"""Fewer bits to a weight: `quantize` of a stage."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mptrain.recipe.base import OneOf, Strict
from mptrain.recipe.method import MethodConfig, Need, Weights

KEPT = "modules kept in fp32: names such as encoder.layer.3, or regular expressions after 're:'"
OPERATIONS = (
    f"{KEPT}; or single operations, MODULE/FUNCTION of all calls of a torch function in a module itself,"
    " MODULE/FUNCTION/N of one of them, from 0: pool.gem/pow/1"
)
SCHEME = (
    "what is quantized: transformer: products with weights and their inputs; convolutional: also residual sums, pools"
    " and means, so that int8 goes through the blocks of a convolutional network"
)
PARTIAL = "less than half of the parameters may be covered, which is an error otherwise; also --allow-partial"


class QuantizeConfig(MethodConfig):
    """Integers in place of floats."""

    field = "quantize"
    by = "mode"
    tag = "quantization"

    embeddings: Literal["fp32", "int8", "int4", "same"] = "fp32"

    @property
    def limit(self) -> float | None:
        """What may be lost where layers that stay in float are sought; None where they are given."""
        return None


def stored_embeddings(quantize: MethodConfig | None) -> Literal["fp32", "int8"]:
    """What exports with fake quantizers store embeddings as, but for the precisions that name another."""
    return "int8" if getattr(quantize, "embeddings", None) in ("int8", "int4") else "fp32"


REDUCED = 7
"""bits of a weight whose products with 8-bit activations fit into 16 bits two by two"""


def _fake_quantized(bits: dict[str, Any], reduce_range: bool) -> Iterator[tuple[str, Weights]]:
    for width in sorted({REDUCED if reduce_range else 8, *bits.values()}):
        yield "quantize.bits", Weights("integers", width, activations=True)


class Qat(QuantizeConfig):
    """Quantization-aware training through nncf.quantize on the torch model."""

    packages = ("nncf",)

    mode: Literal["qat"]
    weights: Literal["symmetric", "asymmetric"] = "symmetric"
    activations: Literal["symmetric", "asymmetric"] = "symmetric"
    embeddings: Literal["fp32", "int8", "int4"] = Field(
        "int8",
        description="int8: rows of all embeddings are rounded in training as exports store them; int4: the embedding of"
        " tokens is rounded before training, which takes up what that costs, and stands still; exported as such in"
        " precision int8_emb4, as int8 elsewhere",
    )
    ignore: list[str] = Field([], description=OPERATIONS)
    bits: dict[str, Literal[4, 8]] = Field({}, description="weight bits by module pattern; default 8")
    scheme: Literal["transformer", "convolutional"] = Field("transformer", description=SCHEME)
    reduce_range: bool = Field(
        False,
        description="weights of 7 bits in place of 8, for x86 CPUs without VNNI or AMX: they add products of two int8"
        " weights in 16 bits, which 8-bit weights exceed",
    )
    smooth_quant: bool = False
    start: Literal["joint", "after_prune"] = Field(
        "after_prune",
        description="after_prune: fake quantizers act from the boundary on, with ranges of the cut model; joint: during"
        " the pruning warm-up too, which costs a little more and was measured to be behind: [jpqd.md](jpqd.md)",
    )
    carry: Literal["slice", "recalibrate"] = Field(
        "slice", description="with start: joint, at the boundary: slice the ranges per channel or calibrate anew"
    )

    def words(self) -> str:
        return "int8 quantization-aware training"

    def leaves(self) -> Iterator[tuple[str, Weights]]:
        return _fake_quantized(self.bits, self.reduce_range)

    def needs(self) -> frozenset[Need]:
        return frozenset({"inputs"})

    def early(self) -> bool:
        return self.start == "joint"

    def why_train(self) -> str:
        return "quantize mode qat needs train; mode ptq does not"


class Ptq(QuantizeConfig):
    """Post-training quantization through nncf.quantize, with calibration data."""

    alone = True
    packages = ("nncf",)

    mode: Literal["ptq"]
    preset: Literal["performance", "mixed"] = Field(
        "mixed", description="performance: symmetric; mixed: symmetric weights, asymmetric activations"
    )
    embeddings: Literal["fp32", "int8"] = "int8"
    ignore: list[str] | Literal["auto"] = Field(
        [],
        description=f"{OPERATIONS}; auto: the fewest layers, and of these the fewest operations, that keep the"
        " validation split's score within max_drop",
    )
    max_drop: Annotated[float, Field(gt=0)] | None = Field(
        None, description="with ignore: auto, what may be lost, counted as gates.max_drop is; default 0.002"
    )
    bits: dict[str, Literal[4, 8]] = Field({}, description="weight bits by module pattern; default 8")
    scheme: Literal["transformer", "convolutional"] = Field("transformer", description=SCHEME)
    reduce_range: bool = Field(
        False,
        description="weights of 7 bits in place of 8, for x86 CPUs without VNNI or AMX: they add products of two int8"
        " weights in 16 bits, which 8-bit weights exceed",
    )
    smooth_quant: bool = True
    fast_bias_correction: bool = True

    @model_validator(mode="after")
    def _limit(self):
        if self.max_drop is not None and self.ignore != "auto":
            raise ValueError("max_drop: is for ignore: auto; drop it, or write ignore: auto")
        return self

    @property
    def limit(self) -> float | None:
        return (0.002 if self.max_drop is None else self.max_drop) if self.ignore == "auto" else None

    def words(self) -> str:
        return "int8 post-training quantization"

    def leaves(self) -> Iterator[tuple[str, Weights]]:
        return _fake_quantized(self.bits, self.reduce_range)

    def needs(self) -> frozenset[Need]:
        return frozenset({"inputs"})


Method = Literal["rtn", "scale", "gptq"]
Granularity = Literal["tensor", "channel", "block"]
Block = Annotated[int, Field(gt=0)] | Literal["auto"]


class WeightOverride(Strict):
    """What is different for the modules that a pattern matches."""

    method: Method | None = None
    bits: Literal[4, 8] | None = None
    granularity: Granularity | None = None
    block_size: Block | None = None
    symmetric: bool | None = None


class RoundedTraining(Strict):
    """Integers train with all else of the stage, through their rounding; scales stay, the last step is kept."""

    inside: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.45,
        description="of a scale: how far from the level of its first integer a weight may start, towards what it was"
        " before it was rounded; 0: on the level, where it takes longer to leave it",
    )


class WeightOnly(QuantizeConfig):
    """int4 or int8 weights, float activations; without training, or trained through their rounding. Exports store these
    very integers."""

    alone = True
    last = True

    mode: Literal["weight_only"]
    method: Method = Field(
        "gptq",
        description="rtn: round to nearest; scale: search of the scales, weighted by calibration inputs;"
        " gptq: error-compensated rounding with calibration data, then descent over integers and scales",
    )
    bits: Literal[4, 8] = 4
    size_budget: Annotated[float, Field(gt=0)] | None = Field(
        None, description="stored bits per compressed weight, scales included: 4 or 8 bits to each by its sensitivity"
    )
    granularity: Granularity = Field("block", description="what shares a scale: a weight, a row, a block of a row")
    block_size: Block = Field(
        32,
        description="columns to a block, must divide every weight's; auto: for each weight the largest of 64, 32 and 16"
        " that does, else one scale to a row",
    )
    symmetric: bool = True
    embeddings: Literal["fp32", "int8", "same"] = Field("int8", description="int8: a scale per row; same: as the rest")
    lm_head: Literal["fp32", "int8", "same"] = Field("int8", description="must equal embeddings where they are tied")
    convolutions: Literal["fp32", "int8", "same"] = Field(
        "int8",
        description="int8: a scale per output channel; same: as the rest, where a row is the channels and kernel of an"
        " output (in / groups · height · width columns)",
    )
    overrides: dict[str, WeightOverride] = Field({}, description="by module pattern; a later one wins")
    ignore: list[str] = Field([], description=KEPT)
    allow_partial: bool = Field(False, description=PARTIAL)
    finetune: RoundedTraining | None = Field(
        None,
        description="train the integers, from those of `method` on; needs `train`. Embeddings that are rounded stand"
        " still in the whole stage",
    )

    def words(self) -> str:
        size = "up to 64" if self.block_size == "auto" else self.block_size
        unit = f"block of {size}" if self.granularity == "block" else self.granularity
        return f"int{self.bits} weights ({self.method}, per {unit}{', trained' * (self.finetune is not None)})"

    def why_alone(self) -> str:
        if self.finetune is not None:
            return ""
        return f"{super().why_alone()}, or trains with its stage: add finetune: {{}}"

    def why_train(self) -> str:
        return "" if self.finetune is None else "quantize.finetune needs train: give epochs and lr, or drop finetune"

    def why_not_widths(self, multiple: int) -> str:
        if self.granularity != "block" or self.block_size == "auto" or multiple % self.block_size == 0:
            return ""
        return (
            f"quantize.block_size: blocks of {self.block_size} do not divide FFN widths that prune.round_ffn leaves at"
            f" multiples of {multiple}: give prune.round_ffn {math.lcm(self.block_size, multiple)}, or block_size: auto"
        )

    def why_not_sharded(self) -> str:
        if self.finetune is None:
            return ""
        return (
            "finetune: blocks are of whole weight matrices, and FSDP2 shards them: launch with DDP (mptrain copy"
            " accelerate-ddp-2gpu), or drop finetune"
        )

    def why_not_split(self) -> str:
        if self.finetune is None:
            return ""
        return (
            "finetune: rounded weights stand in the compute weights, and with precision.master split those are half of"
            " the master: use precision.master fp32"
        )

    def leaves(self) -> Iterator[tuple[str, Weights]]:
        per: dict[str, Literal["tensor", "row", "block"]] = {"tensor": "tensor", "channel": "row", "block": "block"}
        for bits in (4, 8) if self.size_budget is not None else (self.bits,):
            yield "quantize.bits", Weights("integers", bits, per[self.granularity])
            if self.convolutions == "same":
                yield "quantize.convolutions", Weights("integers", bits, per[self.granularity], kernels=True)
        for pattern, change in self.overrides.items():
            granularity = change.granularity or self.granularity
            yield f"quantize.overrides.{pattern}", Weights("integers", change.bits or self.bits, per[granularity])

    def needs(self) -> frozenset[Need]:
        methods = {self.method, *(override.method for override in self.overrides.values())}
        asked: dict[Need, bool] = {"inputs": not methods <= {"rtn", None}, "labels": self.size_budget is not None}
        return frozenset(need for need, wanted in asked.items() if wanted)


QUANTIZE: dict[str, type[QuantizeConfig]] = {"qat": Qat, "ptq": Ptq, "weight_only": WeightOnly}
Quantize = Annotated[QuantizeConfig, OneOf("mode", QUANTIZE)]
