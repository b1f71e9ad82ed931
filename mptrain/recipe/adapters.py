"""Low-rank adapters: `adapters` of a stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mptrain.recipe.method import MethodConfig


class Lora(MethodConfig):
    """Matrices of low rank train in place of the weights, which stand still, and are merged into them at the end
    (LoRA, Hu et al. 2021; over a quantized base, QLoRA, Dettmers et al. 2023)."""

    field = "adapters"
    by = "method"
    tag = "low-rank adapters"
    packages = ("peft",)
    freezes = True

    method: Literal["lora"] = "lora"
    rank: Annotated[int, Field(gt=0)] = 16
    alpha: Annotated[float, Field(gt=0)] = Field(32.0, description="the product of the matrices counts alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="of the inputs of the adapters in training")
    targets: list[str] = Field(
        [],
        description="Linears that get adapters: names or re:PATTERN as of quantize.ignore; default: all but a head and"
        " the output embedding",
    )

    def words(self) -> str:
        return f"adapters of rank {self.rank}, merged"

    def why_train(self) -> str:
        return "adapters need train: give epochs and lr"
