"""Mixed precision of every stage that trains."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    PositiveFloat,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails

from mptrain.core.errors import UserError
from mptrain.recipe.base import Strict


class LossScale(Strict):
    """`dynamic`, a number (a static scale), or these fields.

    Times `growth` after `interval` good steps in a row, times `backoff` at an overflow; the step is skipped.
    """

    init: Annotated[float, Field(gt=0)] = 65536.0
    growth: Annotated[float, Field(gt=1)] = 2.0
    backoff: Annotated[float, Field(gt=0, lt=1)] = 0.5
    interval: Annotated[int, Field(gt=0)] | None = Field(2000, description="null: static")
    floor: Annotated[float, Field(gt=0)] = 1.0
    ceiling: Annotated[float, Field(gt=0)] = 16777216.0
    hysteresis: Annotated[int, Field(gt=0)] = Field(1, description="overflows since it last grew, before it backs off")
    patience: Annotated[int, Field(gt=0)] = Field(
        10, description="overflows in a row at the floor that end the run, with a diagnosis"
    )

    def __init__(self, **settings: Any) -> None:
        """The fields by name, all with defaults.

        - Shapes and dtypes: Python numbers; the scale multiplies a scalar fp32 loss.
        - Units: `init`, `floor` and `ceiling` are factors of the loss; `growth` and `backoff` factors of the scale;
          `interval`, `hysteresis` and `patience` count optimizer steps.
        - Raises UserError that names the setting; within a recipe pydantic's errors say where it stands.
        - Source: Micikevicius et al. 2018, Mixed Precision Training, section 3.2; `hysteresis` and the floor are those
          of DeepSpeed's dynamic loss scale.
        """
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise UserError("; ".join(map(_said, error.errors()))) from None

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        inner: Any = schema
        while inner["type"] != "model":
            inner = inner["schema"]
        inner["custom_init"] = False  # __init__ is for those who write it in Python
        return schema

    @model_validator(mode="after")
    def _ordered(self):
        if self.ceiling < self.floor:
            raise ValueError(f"ceiling must be at least the floor ({self.floor:g}), got {self.ceiling:g}")
        if not self.floor <= self.init <= self.ceiling:
            raise ValueError(f"init must be from floor {self.floor:g} to ceiling {self.ceiling:g}, got {self.init:g}")
        return self

    @classmethod
    def static(cls, scale: float, patience: int = 10) -> LossScale:
        """A scale that stays. patience: steps in a row that may overflow. Raises UserError for one that is not > 0."""
        return cls(init=scale, floor=scale, ceiling=scale, interval=None, patience=patience)

    @classmethod
    def of(cls, value: LossScale | Literal["dynamic"] | float | None, compute: Literal["fp16", "bf16"]) -> LossScale:
        """The setting a user wrote as `value`; None is dynamic where `compute` is fp16 and 1 for bf16, whose range is
        that of fp32. Raises UserError for anything else."""
        if isinstance(value, LossScale):
            return value
        if value == "dynamic" or (value is None and compute == "fp16"):
            return cls()
        if value is None:
            return cls.static(1.0)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf:
            return cls.static(float(value))
        raise UserError(f"loss_scale must be 'dynamic', a positive number or a LossScale, got {value!r}")


def _said(error: ErrorDetails) -> str:
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if not error["loc"]:
        return f"loss_scale.{message}"
    return f"loss_scale.{error['loc'][0]} {message}, got {error['input']!r}; see LossScale"


def _loss_scale(value: Any) -> Any:
    if value == "dynamic":
        return {}
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
        return {"init": value, "floor": value, "ceiling": value, "interval": None}
    if isinstance(value, (dict, LossScale)):
        return value
    raise ValueError(f"must be 'dynamic', a positive number or a mapping, got {value!r}")


ShortPrecision = Literal["fp32", "bf16-master", "fp16-master", "bf16-split", "bf16-split-int8"]


class MixedPrecision(Strict):
    """A short name (fp32, bf16-master, fp16-master, bf16-split, bf16-split-int8), or these fields; for every stage that
    trains."""

    compute: Literal["fp32", "bf16", "fp16"] = Field(description="dtype of forward, backward and the weights they see")
    master: Literal["fp32", "split"] = Field(
        "fp32", description="split: the bf16 weight is the high half of its master, 2 bytes a parameter less"
    )
    moments: Literal["fp32", "int8"] = Field(
        "fp32", description="int8: AdamW's moments in 8 bits each, 6 bytes a parameter less; needs master split"
    )
    keep_fp32: list[str] = Field(
        [], description="parameters whose modules compute in fp32: substrings, 're:REGEX', or 'norms'"
    )
    loss_scale: (
        Annotated[
            LossScale,
            BeforeValidator(_loss_scale, json_schema_input_type=Literal["dynamic"] | PositiveFloat | LossScale),
        ]
        | None
    ) = Field(None, description="default: dynamic for fp16, 1 for bf16")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value not in get_args(ShortPrecision):
            raise ValueError(f"must be a mapping or one of {', '.join(get_args(ShortPrecision))}, got {value!r}")
        compute, *kinds = value.split("-")
        return {
            "compute": compute,
            "master": "split" if "split" in kinds else "fp32",
            "moments": "int8" if "int8" in kinds else "fp32",
        }

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without moments that are fp32, which runs did not name when there were no others: those are resumed and
        their stages reused."""
        return {name: value for name, value in dump(self).items() if (name, value) != ("moments", "fp32")}

    @model_validator(mode="after")
    def _fits(self):
        if self.master == "split" and self.compute != "bf16":
            raise ValueError(f"master split needs compute bf16, got {self.compute}")
        if self.moments == "int8" and self.master != "split":
            raise ValueError(
                f"moments int8 need master split (and compute bf16), got master {self.master}: write master: split, or"
                " drop moments"
            )
        if self.compute == "fp32" and (self.keep_fp32 or self.loss_scale is not None):
            raise ValueError("keep_fp32 and loss_scale need compute bf16 or fp16; with fp32 drop them")
        return self

    def why_not_sharded(self) -> str:
        """Field and reason why it cannot train parameters that FSDP2 shards; empty where it can."""
        if self.master != "split":
            return ""
        return (
            "precision.master: split keeps half of the master in the half weight, which FSDP2 does not keep: use fp32"
            f" (bf16-master){' and drop moments: int8' if self.moments == 'int8' else ''}"
        )

    def words(self) -> str:
        return ", ".join([self.compute, f"{self.master} masters", f"{self.moments} moments"])
