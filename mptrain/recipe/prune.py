"""Structured pruning: `prune` of a stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mptrain.recipe.base import Fraction, Name, OneOf, Strict
from mptrain.recipe.method import WHOLE, MethodConfig, Need, Reads


class Schedule(Strict):
    """When masks begin and when they are final. end 0 means: prune at once, before training."""

    start: Annotated[float, Field(ge=0)] = 0
    end: Annotated[float, Field(ge=0)]
    unit: Literal["epoch", "step"] = "epoch"

    @model_validator(mode="after")
    def _ordered(self):
        if self.start > self.end:
            raise ValueError(f"start ({self.start:g}) must not be after end ({self.end:g})")
        return self


Factor = Annotated[float, Field(ge=1)]


class Keep(Strict):
    """Fraction kept. Give exactly one budget, or `heads` and `ffn` together."""

    encoder_params: Fraction | None = Field(None, description="of the parameters of all attention and FFN layers")
    macs: Fraction | None = Field(None, description="of the multiply-adds of one forward pass at `data.max_length`")
    latency: Fraction | None = Field(
        None,
        description="of the whole model's latency as it is exported (int8 where this stage or a later one quantizes"
        " activations), measured on this host at batch 1, `data.max_length` and the first of"
        " `evaluate.latency.threads`",
    )
    speedup: Factor | list[Factor] | None = Field(
        None,
        description="the same as a factor: 2 is latency 0.5. A list, such as [2, 3, 4], is a family: a stage `ID-2x`,"
        " `ID-3x`, … for each, one after the other, each from the last",
    )
    recovery: Fraction | None = Field(
        None,
        description="of a family: what each point after the first trains, as a share of the stage's `train.epochs`;"
        " default 0.5",
    )
    size: Fraction | None = Field(None, description="of the bytes of the exported model, embeddings included")
    against: Name | None = Field(
        None,
        description="of latency, speedup and size: the earlier stage, or 'model', whose model is the whole; default:"
        " where the stage starts",
    )
    heads: Fraction | None = None
    ffn: Fraction | None = None

    @model_validator(mode="after")
    def _one(self):
        budgets = [n for n in ("encoder_params", "macs", "latency", "speedup", "size") if getattr(self, n) is not None]
        pair = self.heads is not None or self.ffn is not None
        if len(budgets) + pair != 1 or (pair and (self.heads is None or self.ffn is None)):
            raise ValueError(
                "give exactly one of encoder_params, macs, latency, speedup, size, or heads and ffn together"
            )
        if self.against is not None and self.of_export() is None:
            raise ValueError("against: is for latency, speedup and size; drop it")
        if self.recovery is not None:
            raise ValueError("recovery: is of a family, such as speedup: [2, 3, 4]; of one point give train.epochs")
        if isinstance(self.speedup, list):
            raise ValueError(f"speedup: {self.speedup} is a family of stages, which a recipe makes; give one number")
        return self

    def of_export(self) -> tuple[Literal["latency", "size"], float] | None:
        """The budget that counts the whole exported model, and the share of it that stays; None for one of blocks."""
        if self.latency is not None:
            return "latency", self.latency
        if isinstance(self.speedup, float):
            return "latency", 1.0 / self.speedup
        return None if self.size is None else ("size", self.size)


class PruneConfig(MethodConfig):
    """Whole heads and FFN channels are cut; masks close on `schedule`."""

    field = "prune"
    by = "method"
    tag = "pruning"
    reshapes = True

    schedule: Schedule = Schedule(end=0)
    min_heads: Annotated[int, Field(ge=1)] = Field(1, description="kept in every layer")
    min_ffn: Annotated[int, Field(ge=1)] = Field(8, description="channels kept in every layer")
    round_ffn: Annotated[int, Field(ge=1)] = Field(8, description="FFN widths are multiples of this")
    ignore: list[str] = Field(
        [], description="modules left alone: names such as encoder.layer.3, or regular expressions after 're:'"
    )

    @model_validator(mode="before")
    @classmethod
    def _drops(cls, data):
        if isinstance(data, dict) and "drop" in data and "drop" not in cls.model_fields:
            raise ValueError(
                "drop: is for method curvature, which alone measures what a model loses without a whole block; write"
                " method: curvature, or take drop out"
            )
        return data

    def budget(self) -> Keep | None:
        """What to keep; None where training alone decides."""
        return getattr(self, "keep", None)

    def against(self) -> str | None:
        """The stage whose model a budget of the whole exported model counts against; None, where it starts."""
        budget = self.budget()
        return None if budget is None else budget.against

    def words(self) -> str:
        budget = self.budget()
        parts = {} if budget is None else budget.model_dump(exclude_none=True)
        parts.pop("against", None)
        told = [
            f"({v:g} times as fast)" if n == "speedup" else f"(keep {100 * v:g}% of {n.replace('_', ' ')})"
            for n, v in parts.items()
        ]
        return " ".join([super().words(), *told])

    def reads(self) -> frozenset[Reads]:
        budget = self.budget()
        asked = None if budget is None else budget.of_export()
        if asked is None:
            return frozenset()
        return frozenset({"target", "bytes"} if asked[0] == "size" else {"target"})

    def early(self) -> bool:
        return True

    def why_train(self) -> str:
        return "prune.schedule needs train; without train use end: 0" if self.schedule.end > 0 else ""

    def why_not_sharded(self) -> str:
        if self.schedule.end == 0:
            return ""
        return f"schedule: masks {WHOLE}, or prune at once (end: 0)"

    def why_not_split(self) -> str:
        if self.schedule.end == 0:
            return ""
        return (
            "schedule: masks act on the compute weights, and with precision.master split those"
            " are half of the master: use precision.master fp32, or prune at once (end: 0)"
        )


class Movement(PruneConfig):
    """Movement sparsity (Sanh et al. 2020) as NNCF 2.x defined it, or driven by a target."""

    method: Literal["movement"]
    keep: Keep | None = Field(None, description="target; a cubic top-k schedule reaches it")
    regularization: Annotated[float, Field(gt=0)] | None = Field(
        None, description="the NNCF 2.x way: importance regularization factor; the sparsity follows from it"
    )
    score: Literal["block", "shared"] = Field("block", description="shared: one score per head and per FFN channel")
    attention_block: Annotated[tuple[int, int], Field(strict=False)] = (32, 32)  # YAML has lists, no tuples
    score_lr: Annotated[float, Field(gt=0)] | None = Field(None, description="default: the stage's lr")
    threshold: float | None = Field(None, description="tau_0; default: automatic from the scores at warm-up start")

    @model_validator(mode="after")
    def _target(self):
        if (self.keep is None) == (self.regularization is None):
            raise ValueError("give exactly one of keep (a target) and regularization (the NNCF 2.x way)")
        if self.schedule.end == 0:
            raise ValueError("movement needs a warm-up: give schedule.end")
        return self


class Fisher(PruneConfig):
    """Fisher mask search (Kwon et al. 2022), at once or gradually during the warm-up."""

    method: Literal["fisher"]
    keep: Keep
    rescale: bool = Field(False, description="least-squares refit of the kept columns at the boundary")

    def needs(self) -> frozenset[Need]:
        asked: dict[Need, bool] = {"labels": self.schedule.end == 0, "inputs": self.rescale}
        return frozenset(need for need, wanted in asked.items() if wanted)


class Magnitude(PruneConfig):
    """Baseline: L2 norm of the weights of a head or channel."""

    method: Literal["magnitude"]
    keep: Keep


class Curvature(PruneConfig):
    """At once, by the curvature of the loss: units leave one by one, and what stays is refitted after each."""

    method: Literal["curvature"]
    keep: Keep
    damping: Annotated[float, Field(gt=0)] = Field(
        1e-3, description="of the covariances, in parts of their mean diagonal; more for few calibration examples"
    )
    drop: bool | None = Field(
        None,
        description="true: whole attentions and FFNs may go, where that costs least; what they gave on average stays as"
        " a bias. Default: of each at least min_heads and min_ffn stay",
    )

    @model_validator(mode="after")
    def _at_once(self):
        if self.schedule.end > 0:
            raise ValueError(
                f"schedule.end: curvature prunes at once, got {self.schedule.end:g}; drop schedule, or use fisher"
            )
        return self

    def needs(self) -> frozenset[Need]:
        return frozenset({"inputs"})

    def words(self) -> str:
        return f"{super().words()}, whole blocks too" if self.drop else super().words()

    def empties(self) -> bool:
        return bool(self.drop)


PRUNE: dict[str, type[PruneConfig]] = {
    "movement": Movement,
    "fisher": Fisher,
    "magnitude": Magnitude,
    "curvature": Curvature,
}
Prune = Annotated[PruneConfig, OneOf("method", PRUNE)]
