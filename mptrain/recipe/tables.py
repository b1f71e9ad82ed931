"""Look-up tables of weights: `palettize` of a stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from mptrain.recipe.base import OneOf, Strict
from mptrain.recipe.method import WHOLE, MethodConfig, Need, Reads, Weights
from mptrain.recipe.weights import PARTIAL

Bits = Annotated[int, Field(ge=1, le=8)]


class TableOverride(Strict):
    """What differs for the modules of a pattern."""

    bits: Bits | None = None
    granularity: Literal["tensor", "channel_group"] | None = None
    group_size: Annotated[int, Field(gt=0)] | None = None
    cluster_dim: Annotated[int, Field(gt=0)] | None = None
    per_channel_scale: bool | None = None


class TableTraining(Strict):
    """The table entries train with the stage (and all that is not palettized); the last step is kept."""

    refresh: Annotated[int, Field(ge=0)] = Field(
        0,
        description="optimizer steps between new assignments of weights to entries; 0: the assignments stay;"
        " 1 kept most of an OPT at 2 and 3 bits",
    )
    lr: Annotated[float, Field(gt=0)] | None = Field(None, description="of the table entries; default: the stage's lr")


class PalettizeConfig(MethodConfig):
    """Weights as entries of tables."""

    field = "palettize"
    by = "method"
    tag = "palettization"
    last = True
    again = True


class Palettize(PalettizeConfig):
    """Weights as indices into tables of 2^bits entries (k-means)."""

    method: Literal["kmeans", "skm"] = Field(
        description="kmeans: needs no data; skm: weights count by their squared gradients on calibration data"
    )
    bits: Bits = 4
    size_budget: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="stored bits per palettized weight, tables and scales included: 1, 2, 3, 4, 6 or 8 bits to each by"
        " its sensitivity on calibration data, except where overrides, embeddings or lm_head give a number",
    )
    granularity: Literal["tensor", "channel_group"] = Field(
        "channel_group", description="one table for a weight, or one for every group of output channels"
    )
    group_size: Annotated[int, Field(gt=0)] = Field(
        16, description="channels of a group; where it does not divide the channels, the next smaller that does"
    )
    cluster_dim: Annotated[int, Field(gt=0)] = Field(
        1, description="neighbouring weights that share an index; a weight takes bits / cluster_dim bits"
    )
    per_channel_scale: bool = Field(False, description="a scale for every output channel, besides the tables")
    embeddings: bool | Bits = Field(True, description="also embeddings; a number gives their bits")
    lm_head: bool | Bits = Field(True, description="also the output layer of a language model, unless tied")
    ignore: list[str] = Field(
        [], description="modules left alone: names such as encoder.layer.3, or regular expressions after 're:'"
    )
    overrides: dict[str, TableOverride] = Field({}, description="by module pattern; a later one wins")
    allow_partial: bool = Field(False, description=PARTIAL)
    finetune: TableTraining | None = Field(None, description="train the tables; needs `train`")

    def words(self) -> str:
        how = {"kmeans": "k-means", "skm": "sensitive k-means"}[self.method]
        size = "" if self.size_budget is None else f", at most {self.size_budget:g} bits a weight"
        bits = f"{self.bits}-bit" if self.size_budget is None else "mixed-bit"
        return f"{bits} palettization ({how}{size}{', tables trained' * (self.finetune is not None)})"

    def leaves(self) -> Iterator[tuple[str, Weights]]:
        per: dict[str, Literal["tensor", "group"]] = {"tensor": "tensor", "channel_group": "group"}
        shared = {"vectors": self.cluster_dim > 1, "row_scale": self.per_channel_scale}
        bits = 4 if self.size_budget is not None else self.bits  # a budget chooses among those that are stored
        yield "palettize.bits", Weights("tables", bits, per[self.granularity], **shared)
        for field in ("embeddings", "lm_head"):
            bits = getattr(self, field)
            if bits is not True and bits:
                yield f"palettize.{field}", Weights("tables", bits, per[self.granularity], **shared)
        for pattern, change in self.overrides.items():
            yield (
                f"palettize.overrides.{pattern}",
                Weights(
                    "tables",
                    change.bits or self.bits,
                    per[change.granularity or self.granularity],
                    vectors=(change.cluster_dim or self.cluster_dim) > 1,
                    row_scale=self.per_channel_scale if change.per_channel_scale is None else change.per_channel_scale,
                ),
            )

    def needs(self) -> frozenset[Need]:
        return frozenset(["labels"] if self.method == "skm" or self.size_budget is not None else [])

    def reads(self) -> frozenset[Reads]:
        return frozenset({"widths"} if self.size_budget is not None else ())

    def why_train(self) -> str:
        return "" if self.finetune is None else "palettize.finetune needs train: give epochs and lr, or drop finetune"

    def why_not_sharded(self) -> str:
        if self.finetune is None:
            return ""
        return f"finetune: tables {WHOLE}, or drop finetune"

    def why_not_split(self) -> str:
        if self.finetune is None:
            return ""
        return (
            "finetune: table entries stand in the compute weights, and with precision.master"
            " split those are half of the master: use precision.master fp32"
        )


PALETTIZE: dict[str, type[PalettizeConfig]] = {"kmeans": Palettize, "skm": Palettize}
PaletteChoice = Annotated[PalettizeConfig, OneOf("method", PALETTIZE)]
