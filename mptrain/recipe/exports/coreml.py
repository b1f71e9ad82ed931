"""Core ML packages (mlprogram)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mptrain.recipe.base import Strict
from mptrain.recipe.exports.base import Cache, ExportSpec, Limit, Package, Stored, Use
from mptrain.recipe.method import Weights
from mptrain.recipe.stage import Stage

CoreMlPrecision = Literal["fp32", "fp16"]
CoreMlTarget = Literal["iOS15", "iOS16", "iOS17", "iOS18"]


class CoreMlShapes(Strict):
    """Sizes of the batch and of the length in tokens (images have a batch alone)."""

    kind: Literal["fixed", "enumerated", "ranged"] = "ranged"
    batch: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)] = Field(
        [1, 64], description="fixed: one size; enumerated: all of them; ranged: lowest and highest"
    )
    length: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)] = [1, 128]

    @model_validator(mode="after")
    def _sizes(self):
        for name in ("batch", "length"):
            sizes = getattr(self, name)
            if self.kind == "fixed" and len(sizes) != 1:
                raise ValueError(f"kind fixed takes one {name}, got {sizes}")
            if self.kind == "ranged" and (len(sizes) > 2 or sizes != sorted(sizes)):
                raise ValueError(f"kind ranged takes [lowest, highest] or one {name}, got {sizes}")
        return self


class CoreMl(ExportSpec):
    """A Core ML package (mlprogram)."""

    title = "Core ML"
    extra = "coreml"
    ending = ".mlpackage"
    packages = (Package("coremltools", "coremltools", "==9.0"),)
    library = "coreml"
    timed = False
    foresees = "own"
    caches = "float16"

    format: Literal["coreml"]
    precision: list[CoreMlPrecision] = ["fp32", "fp16"]
    minimum_deployment_target: CoreMlTarget = "iOS18"
    shapes: CoreMlShapes = CoreMlShapes()
    route: Literal["export", "trace"] = Field("export", description="torch.export, or a trace for models it refuses")
    scaled_tables: bool = Field(
        False, description="write tables with a scale to each row, which crash on some GPUs (coremltools issue 2688)"
    )
    cache: Cache = Field(
        None,
        description="causal-lm: generate with a key-value cache of so many tokens, kept in (float16) states; batch 1",
    )

    @model_validator(mode="after")
    def _cached(self):
        if self.cache is None:
            return self
        if self.minimum_deployment_target != "iOS18":
            raise ValueError(
                f"cache: {self.minimum_deployment_target} has no states; give minimum_deployment_target: iOS18"
            )
        if self.shapes != CoreMlShapes() or self.route != "export":
            given = f"shapes: {self.shapes.model_dump()}" if self.shapes != CoreMlShapes() else f"route: {self.route}"
            raise ValueError(f"cache: sets its own shapes (batch 1) and the route export; drop {given}")
        return self

    def longest(self) -> Limit | None:
        return super().longest() or Limit("shapes.length", max(self.shapes.length))

    def sized(self, length: int, free: bool) -> Self:
        if "shapes" in self.model_fields_set or self.cache is not None:
            return self
        sizes = [1, length] if free and length > 1 else [length]
        return self.model_copy(update={"shapes": CoreMlShapes(length=sizes)})

    def widths(self) -> frozenset[int]:
        return super().widths() - ({3} if self.minimum_deployment_target != "iOS18" else set())

    def usual(self, stage: Stage) -> str:
        return "fp16"  # in which Apple's processors compute

    def stores(self, weights: Weights) -> Stored:
        return stores(self.minimum_deployment_target, weights, self.scaled_tables)

    def targets(self) -> list[tuple[str, ExportSpec]]:
        named = {"iOS18": "iOS 18", "iOS16": "iOS 16 and 17", "iOS15": "iOS 15"}
        return [
            (f"{self.title}, {name}", self.model_copy(update={"minimum_deployment_target": target}))
            for target, name in named.items()
        ]

    @classmethod
    def loading(cls, use: Use) -> list[str]:
        return [
            "import coremltools as ct",
            "import numpy as np",
            *use.imports,
            "",
            f"model = ct.models.MLModel({use.path!r})  # runs on macOS; in an app, add the package to Xcode",
            *use.inputs,
            "names = [port.name for port in model.get_spec().description.input]",
            "types = {'i': np.int32, 'f': np.float32}",
            "outputs = model.predict({name: inputs[name].astype(types[inputs[name].dtype.kind]) for name in names})",
        ]


def stores(target: str, weights: Weights, scaled_tables: bool = False) -> Stored:
    """What a package for a deployment target makes of compressed weights."""
    if target == "iOS15":
        return Stored(
            "refused",
            "minimum_deployment_target: iOS15 stores no compressed weights, Core ML would silently expand them; use"
            " iOS18 (int4 blocks, grouped tables), or iOS16 for int8 and tables per tensor",
        )
    if weights.kind == "integers":
        return _integers(target, weights)
    if weights.row_scale and not scaled_tables:
        return Stored(
            "refused",
            "tables with a scale to each row crash on some GPUs (coremltools issue 2688); palettize without"
            " per_channel_scale, or set scaled_tables: true in the export to write them all the same",
        )
    return _tables(target, weights)


def _integers(target: str, weights: Weights) -> Stored:
    dropped = "; quantizers of activations are dropped: the package computes in floating point"
    if weights.kernels and weights.per == "block":
        return Stored(
            "refused",
            "blocks of a convolution's columns go through its kernel, and Core ML's do not: leave"
            " quantize.convolutions at int8; quantize.overrides may give them 4 bits, with a scale per channel",
        )
    if target == "iOS18":
        how = (
            "int4, uint4, int8 or uint8 data (constexpr_blockwise_shift_scale), scales in the precision of the package"
        )
        return Stored("stored", how + (dropped if weights.activations else "; other widths in the next of 4 and 8"))
    if weights.bits > 4 and weights.per != "block":
        how = "constexpr_affine_dequantize, one scale to the tensor or row"
        return Stored("stored", how + (dropped if weights.activations else ""))
    how = f"needs minimum_deployment_target iOS18; {target} holds int8 with a scale to the tensor or row"
    return Stored("refused", how)


def _tables(target: str, weights: Weights) -> Stored:
    if target == "iOS18":
        return Stored(
            "stored",
            "constexpr_lut_to_dense, 1 to 8 bits (5 as 6, 7 as 8), a table to each group of rows, scalar or vector; a"
            " weight whose rows are no multiple of the group is expanded to floats, and the report says so",
        )
    if weights.per == "tensor" and not weights.vectors and weights.bits != 3 and not weights.row_scale:
        return Stored("stored", "constexpr_lut_to_dense, one scalar table to the tensor, of 1, 2, 4, 6 or 8 bits")
    return Stored(
        "refused",
        f"needs minimum_deployment_target iOS18; {target} holds one scalar table of 1, 2, 4, 6 or 8 bits to a tensor",
    )
