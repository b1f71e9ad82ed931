"""Core AI assets (.aimodel, iOS 27 and macOS 27)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mptrain.recipe.exports.base import Cache, ExportSpec, Package, Stored, Use
from mptrain.recipe.method import Weights
from mptrain.recipe.stage import Stage


class CoreAi(ExportSpec):
    """A Core AI asset (.aimodel, iOS 27 and macOS 27), scored by executing it on this host's CPU."""

    title = "Core AI"
    extra = "coreai"
    ending = ".aimodel"
    packages = (
        Package("coreai-core", "coreai", ">=1.0.0b3"),
        Package("coreai-torch", "coreai_torch", ">=0.4.3"),
        Package("coreai-opt", "coreai_opt", ">=0.3.0"),
    )
    library = "coreai"
    timed = False
    foresees = "own"
    caches = "float32"

    format: Literal["coreai"]
    precision: list[Literal["fp32", "fp16"]] = Field(
        ["fp32", "fp16"], description="of the arithmetic; weights are stored as they were compressed"
    )
    shapes: Literal["dynamic"] = "dynamic"
    cache: Cache = Field(
        None, description="causal-lm: generate with a key-value cache of so many tokens, one token to a call; fp32"
    )

    @model_validator(mode="after")
    def _cached(self):
        if self.cache is not None and self.precision != ["fp32"]:
            raise ValueError(f"cache: Core AI holds it in fp32 here; give precision: [fp32], got {self.precision}")
        return self

    def usual(self, stage: Stage) -> str:
        return "fp16" if self.cache is None else "fp32"

    def stores(self, weights: Weights) -> Stored:
        if weights.kind == "tables":
            return Stored(
                "stored",
                "lut_to_dense on uiN indices of 1, 2, 3, 4, 6 and 8 bits, with a scale per row where there is one; a"
                " last group of fewer rows repeats tables; 5 and 7 bits take the next width",
            )
        if weights.activations:
            return Stored(
                "stored",
                "si8, ui8, si4 or ui4 constants with their learned scales (blockwise_shift_scale); activations compute"
                " in floating point, their learned ranges are left out; embeddings are int8 by row where the recipe"
                " says so",
            )
        return Stored(
            "stored",
            "si2 … ui8 constants with their scales and zero points; 1, 3, 5, 6 and 7 bit integers take the next width",
        )

    @classmethod
    def loading(cls, use: Use) -> list[str]:
        return [
            "import asyncio",
            "",
            "from coreai.authoring.asset import AIModelAsset",
            "from coreai.runtime import NDArray",
            *use.imports,
            "",
            *use.inputs,
            "",
            "async def run():  # on this host's CPU; in an app, add the asset to Xcode",
            f"    async with AIModelAsset.load({use.path!r}).executable() as model:",
            '        main = model.load_function("main")',
            "        names = main.desc.input_names",
            "        types = {name: main.desc.input_descriptor(name).dtype for name in names}",
            "        return await main({name: NDArray(inputs[name].astype(types[name])) for name in names})",
            "",
            "outputs = asyncio.run(run())",
        ]
