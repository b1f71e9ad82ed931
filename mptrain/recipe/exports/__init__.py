"""The exports: a format each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mptrain.recipe.base import Name, Strict

Precision = Literal["fp32", "fp16", "int8", "int8_emb4", "compressed"]
CoreMlPrecision = Literal["fp32", "fp16"]
CoreMlTarget = Literal["iOS15", "iOS16", "iOS17", "iOS18"]
OF = "stage ids; 'model': the model as it was given, which is then the baseline (else the first stage is)"


class OpenVino(Strict):
    id: Name
    format: Literal["openvino"]
    of: list[str] = Field(description=OF)
    precision: list[Precision] = Field(
        ["fp32", "int8", "compressed"],
        description="each stage has those that fit it; compressed: the integers of a weight-only stage; fp16: weights"
        " stored half, and in fp32 what a search finds that fp16 would break",
    )
    shapes: Literal["dynamic"] = "dynamic"


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


class CoreMl(Strict):
    """A Core ML package (mlprogram)."""

    id: Name
    format: Literal["coreml"]
    of: list[str] = Field(description=OF)
    precision: list[CoreMlPrecision] = ["fp32", "fp16"]
    minimum_deployment_target: CoreMlTarget = "iOS18"
    shapes: CoreMlShapes = CoreMlShapes()
    route: Literal["export", "trace"] = Field("export", description="torch.export, or a trace for models it refuses")
    scaled_tables: bool = Field(
        False, description="write tables with a scale to each row, which crash on some GPUs (coremltools issue 2688)"
    )
    cache: Annotated[int, Field(gt=0)] | None = Field(
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


class CoreAi(Strict):
    """A Core AI asset (.aimodel, iOS 27 and macOS 27), scored by executing it on this host's CPU."""

    id: Name
    format: Literal["coreai"]
    of: list[str] = Field(description=OF)
    precision: list[Literal["fp32", "fp16"]] = Field(
        ["fp32", "fp16"], description="of the arithmetic; weights are stored as they were compressed"
    )
    shapes: Literal["dynamic"] = "dynamic"
    cache: Annotated[int, Field(gt=0)] | None = Field(
        None, description="causal-lm: generate with a key-value cache of so many tokens, one token to a call; fp32"
    )

    @model_validator(mode="after")
    def _cached(self):
        if self.cache is not None and self.precision != ["fp32"]:
            raise ValueError(f"cache: Core AI holds it in fp32 here; give precision: [fp32], got {self.precision}")
        return self


Export = Annotated[OpenVino | CoreMl | CoreAi, Field(discriminator="format")]


def cache_of(export: Export) -> int | None:
    """Tokens of the key-value cache that an export keeps; None without one."""
    return None if isinstance(export, OpenVino) else export.cache
