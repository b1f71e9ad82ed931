"""ONNX files, run by onnxruntime."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mptrain.recipe.exports.base import Cache, ExportSpec, Package, Stored, Use
from mptrain.recipe.method import Weights
from mptrain.recipe.stage import Stage

PLAIN = ("fp32", "fp16")
OPSET = 23
"""the first with an operation of attention"""


class Onnx(ExportSpec):
    """An ONNX file of opset 23, run by onnxruntime 1.23 or newer."""

    title = "ONNX"
    extra = "onnx"
    ending = ".onnx"
    packages = (
        Package("onnx", "onnx", ">=1.19"),
        Package("onnxscript", "onnxscript", ">=0.6"),
        Package("onnxruntime", "onnxruntime", ">=1.23"),
    )
    library = "onnx"
    caches = "float32"
    generates = True
    foresees = "all"
    checks = frozenset({"fused_attention", "max_casts", "effective_precision"})

    format: Literal["onnx"]
    precision: list[Literal["fp32", "fp16", "int8", "compressed"]] = Field(
        ["fp32", "int8", "compressed"],
        description="each stage has those that fit it; compressed: the integers of a weight-only stage; fp16: all of"
        " the file computes in half, but for what a search finds that fp16 would break",
    )
    shapes: Literal["dynamic"] = "dynamic"
    cache: Cache = Field(
        None,
        description="causal-lm: generate with a key-value cache, which are inputs and outputs of the file and grow with"
        " the text; it is scored, and checked token by token, on texts of up to so many tokens",
    )

    def precisions(self, stage: Stage) -> tuple[str, ...]:
        """Of a quantized stage int8, and where it is pruned too its structure alone, without the quantizers."""
        if stage.quantizes:
            return (*PLAIN, "int8") if stage.reshapes else ("int8",)
        return ("compressed",) if any(weights.kind == "integers" for _, weights in stage.leaves()) else PLAIN

    def drops_quantizers(self, precision: str) -> bool:
        return precision in PLAIN

    def stores(self, weights: Weights) -> Stored:
        if weights.kind == "tables":
            return Stored("expanded", "float32: ONNX has no operation that keeps a table of weights")
        if weights.activations:
            return Stored("stored", "QuantizeLinear and DequantizeLinear with the learned ranges, weights int8 or int4")
        if weights.kernels:
            return Stored(
                "stored", "DequantizeLinear on int4, uint4, int8 or uint8 before Conv, computed at every call"
            )
        return Stored(
            "stored",
            "MatMulNBits for 4 and 8 bits in blocks (a wider block is repeated in blocks of at most 128), else"
            " DequantizeLinear on int4, uint4, int8 or uint8; 2 and 3 bits in the next width; embeddings are looked up"
            " as integers",
        )

    def bytes_per_weight(self, precision: str, learned: tuple[float | None, float | None]) -> tuple[float, float]:
        return super().bytes_per_weight(precision, (None, None) if self.drops_quantizers(precision) else learned)

    @classmethod
    def loading(cls, use: Use) -> list[str]:
        if use.cached and use.processor is not None:
            return [
                "from optimum.onnxruntime import ORTModelForCausalLM  # of optimum-onnx, with transformers < 4.58",
                *use.imports,
                "",
                f"model = ORTModelForCausalLM.from_pretrained({use.folder!r}, use_io_binding=False)",
                *[line.replace('"np"', '"pt"') for line in use.inputs],
                "tokens = model.generate(**inputs, max_new_tokens=32)",
            ]
        return [
            "import onnxruntime",
            *use.imports,
            "",
            f'session = onnxruntime.InferenceSession({use.path!r}, providers=["CPUExecutionProvider"])',
            *use.inputs,
            "names = [port.name for port in session.get_inputs()]",
            "outputs = session.run(None, {name: inputs[name] for name in names})",
        ]
