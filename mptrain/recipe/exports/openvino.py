"""OpenVINO IR, in a folder that optimum-intel loads."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import Field

from mptrain.recipe.exports.base import Cache, ExportSpec, Package, Stored, Use
from mptrain.recipe.method import Weights
from mptrain.recipe.stage import Stage

Precision = Literal["fp32", "fp16", "int8", "int8_emb4", "compressed"]
PLAIN = ("fp32", "fp16")
_UNCACHED = {"OVModelForCausalLM": ", use_cache=False"}
"""by class of optimum-intel, whose default is a cache, whatever the config says"""


class OpenVino(ExportSpec):
    title = "OpenVINO"
    extra = "openvino"
    ending = ".xml"
    packages = (
        Package("openvino", "openvino", ">=2026.0"),
        Package("nncf", "nncf", ">=3.2,<4"),
        Package("optimum-intel", "optimum.intel", ">=2.1,<2.2", needed=False),
    )
    library = "openvino"
    caches = "float32"
    heads_cached = True
    streams = True
    foresees = "own"
    generates = True
    checks = frozenset({"fused_attention", "effective_precision"})

    format: Literal["openvino"]
    precision: list[Precision] = Field(
        ["fp32", "int8", "compressed"],
        description="each stage has those that fit it; compressed: the integers of a weight-only stage; fp16: weights"
        " stored half, and in fp32 what a search finds that fp16 would break",
    )
    shapes: Literal["dynamic"] = "dynamic"
    hint: Literal["f32", "bf16", "f16"] = Field(
        "f32",
        description="INFERENCE_PRECISION_HINT that it is compiled, scored and timed with; a CPU without such arithmetic"
        " computes in f32 and says nothing: gates.effective_precision does",
    )
    cache: Cache = Field(
        None,
        description="causal-lm: generate with a key-value cache, which grows with the text; it is scored, and checked"
        " token by token, on texts of up to so many tokens",
    )

    def precisions(self, stage: Stage) -> tuple[str, ...]:
        """Of a quantized stage the quantized ones, and where it is pruned too its structure alone, without them."""
        if stage.quantizes:
            return (*PLAIN, "int8", "int8_emb4") if stage.reshapes else ("int8", "int8_emb4")
        return ("compressed",) if any(weights.kind == "integers" for _, weights in stage.leaves()) else PLAIN

    def drops_quantizers(self, precision: str) -> bool:
        return precision in PLAIN

    def variant(self, stage: str, precision: str) -> str:
        plain = self.cache is None and not self.heads and self.hint == "f32"
        return f"{stage}_{precision}" if plain else super().variant(stage, precision)

    def stores(self, weights: Weights) -> Stored:
        if weights.kind == "tables":
            return Stored(
                "expanded",
                "float32: the CPU plugin has no kernel that keeps a table, and would expand it when it loads the model",
            )
        if weights.activations:
            return Stored(
                "stored", "i8 or i4 weights with their learned scales, FakeQuantize on the inputs of their layers"
            )
        return Stored(
            "stored", "i4, u4, i8 or u8 constants (asymmetric: unsigned) with fp16 scales, as NNCF lays them out"
        )

    def bytes_per_weight(self, precision: str, learned: tuple[float | None, float | None]) -> tuple[float, float]:
        if self.drops_quantizers(precision):
            learned = None, None
        if precision == "int8_emb4":
            learned = learned[0], 0.5 + 2 / 64  # groups of 64 with a scale in fp16
        return super().bytes_per_weight(precision, learned)

    @classmethod
    def loading(cls, use: Use) -> list[str]:
        hint = "# as it was measured; left to itself, OpenVINO computes in bf16 on CPUs with AMX"
        options = f'{{"INFERENCE_PRECISION_HINT": {json.dumps(use.inference)}}}'
        if use.heads and use.cached:
            return [
                "import numpy as np",
                "import openvino",
                *use.imports,
                "",
                hint,
                f'model = openvino.compile_model({use.path!r}, "CPU", {options})',
                "request = model.create_infer_request()  # keeps the text so far; request.reset_state() forgets it",
                *use.inputs,
                'inputs["position_ids"] = inputs["attention_mask"].cumsum(1) - 1',
                'inputs["beam_idx"] = np.arange(len(inputs["input_ids"]), dtype=np.int32)',
                "outputs = request.infer({port.any_name: inputs[port.any_name] for port in model.inputs})",
                "# next the chosen token alone, as input_ids [b, 1], with the attention_mask of all tokens so far",
            ]
        if use.heads or use.optimum is None or use.processor is None:
            return [
                "import openvino",
                *use.imports,
                "",
                hint,
                f'model = openvino.compile_model({use.path!r}, "CPU", {options})',
                *use.inputs,
                "outputs = model({port.any_name: inputs[port.any_name] for port in model.inputs})",
            ]
        argument = {"AutoImageProcessor": "image_processor", "AutoFeatureExtractor": "feature_extractor"}
        more = "" if use.cached else _UNCACHED.get(use.optimum, "")

        def load(folder: str) -> str:
            return f"model = {use.optimum}.from_pretrained({folder}, ov_config={options}{more})"

        if use.pipeline is None:
            imports = [f"from optimum.intel import {use.optimum}", *use.imports, "", hint]
            return [*imports, load(repr(use.folder)), *use.inputs, "outputs = model(**inputs)"]
        lines = [
            f"from optimum.intel import {use.optimum}",
            f"from transformers import {use.processor}, pipeline",
            "",
            f"folder = {use.folder!r}",
            hint,
            load("folder"),
            f"processor = {use.processor}.from_pretrained(folder)",
            f"run = pipeline({use.pipeline!r}, model=model, {argument.get(use.processor, 'tokenizer')}=processor)",
        ]
        if use.cut is not None:
            run = f"run({use.input}, truncation=True, max_length={use.cut})"
            lines.append(f"{run}  # longer texts are cut, as they were when it was scored")
        return lines
