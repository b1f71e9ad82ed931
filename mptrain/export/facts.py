"""What is known of an exported model once it has been written and opened: `Facts`, for gates and reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Facts:
    """None: not known, or of no meaning for the format; left out of the JSON.

    more: facts that only the format's own readers know.
    """

    weight_types: Mapping[str, int] | None = None
    """bytes of the weights in the file, by stored type"""
    inference_precision: str | None = None
    """of the floating-point part, as it really runs: "f32", "f16", "bf16" """
    left_to_itself: str | None = None
    """what the runtime would compute that in here if it were not told, where that is another type"""
    fused_attention: int | None = None
    """attention blocks that run as one operation"""
    fused_nodes: Sequence[str] | None = None
    """the names of these operations"""
    attention_layers: int | None = None
    """all of them"""
    int8_layers: Sequence[str] | None = None
    """torch names of Linears and convolutions whose inputs arrive as 8-bit integers"""
    fp32_layers: Sequence[str] | None = None
    layer_precisions: Mapping[str, Mapping[str, int]] | None = None
    """of layers with weights, by type as the runtime calls it, how many compute in each of i8, f32, f16, bf16"""
    casts: int | None = None
    """conversions of type in the graph"""
    float_casts: int | None = None
    """those between float and half"""
    cache: int | None = None
    """tokens that a key-value cache holds"""
    cache_precision: str | None = None
    """ "fp16" or "fp32" """
    cache_fed: str | None = None
    """how texts went in when it was compared and scored"""
    execution: str | None = None
    """what computed the scores, where it is not the runtime the format is for"""
    half: Mapping[str, Any] | None = None
    """of an fp16 export: kept_fp32 {operation: why}, casts, and differences (`mptrain.verify.overflow.described`)"""
    dropped: str | None = None
    """what of the model the format has no place for"""
    more: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "more"}
        return {name: value for name, value in known.items() if value is not None} | dict(self.more)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Facts:
        """Of `as_json`, also of another version's: what is not a field goes to `more`."""
        names = {f.name for f in fields(cls)} - {"more"}
        known = {name: value for name, value in found.items() if name in names}
        return cls(**known, more={name: value for name, value in found.items() if name not in names})

    def __or__(self, other: Facts) -> Facts:
        """Both; what `other` knows counts."""
        return Facts.from_json(self.as_json() | other.as_json())

    def exact(self, precision: str) -> bool:
        """Whether it should compute what the torch model does, to the last digits: fp32, also as it runs, and in its
        key-value cache, whose rounding would decide later outputs."""
        rounds = self.inference_precision in ("bf16", "f16") or self.cache_precision == "fp16"
        return precision == "fp32" and not rounds


PIECES = "texts went in piece by piece"
WHOLE = "texts went in whole, and made-up ones token by token too"
NOTHING = Facts()
