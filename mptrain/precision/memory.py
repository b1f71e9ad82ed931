"""What training takes in memory under each precision, before anything is trained.

    bytes a parameter       weights  masters  remainder  gradients  moments   sum
    fp32                       4        -         -          4         8       16
    fp16-master, bf16-master   2        4         -          2         8       16
    bf16-split                 2        -         2          2         8       14

The moments are AdamW's. A parameter kept in fp32 takes what it takes under fp32, a tied one counts once, and
buffers start at multiples of 16 elements, so the sum is what `MasterWeights` allocates. Accumulation of
half gradients in fp32 takes 4 more. Activations are not counted: they depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from mptrain.precision.flat import ALIGN
from mptrain.precision.policy import Compute, Master, Policy, kept_in_fp32

PRECISIONS: dict[str, tuple[Compute, Master] | None] = {
    "fp32": None,
    "fp16-master": ("fp16", "fp32"),
    "bf16-master": ("bf16", "fp32"),
    "bf16-split": ("bf16", "split"),
}
"""compute and master dtype by short name"""


@dataclass(frozen=True)
class Memory:
    """Bytes while training with AdamW. weights: what forward reads; masters hold the kept ones too."""

    precision: str
    parameters: int
    kept_fp32: int
    """of the parameters"""
    weights: int
    masters: int
    remainders: int
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        return self.weights + self.masters + self.remainders + self.gradients + self.moments

    @property
    def per_parameter(self) -> float:
        return self.total / max(self.parameters, 1)


def predict(model: nn.Module, precision: str, keep_fp32: Sequence[str] = ()) -> Memory:
    """Memory of training all floating parameters of `model` under a precision of `PRECISIONS`.

    Raises ModelError for a pattern of keep_fp32 that matches nothing or everything.
    """
    sizes = {id(p): p.numel() for p in model.parameters() if p.is_floating_point()}
    count = sum(sizes.values())
    chosen = PRECISIONS[precision]
    if chosen is None:
        return Memory(precision, count, count, 4 * count, 0, 0, 4 * count, 8 * count)
    kept = kept_in_fp32(model, Policy(*chosen, keep_fp32=keep_fp32)).parameters
    fp32, half = ([n for i, n in sizes.items() if (i in kept) == wanted] for wanted in (True, False))
    aligned, split = _aligned(half), chosen[1] == "split"
    return Memory(
        precision,
        count,
        sum(fp32),
        weights=2 * aligned + _aligned(fp32) * 4,
        masters=0 if split else 4 * aligned,
        remainders=2 * aligned if split else 0,
        gradients=2 * sum(half) + 4 * sum(fp32),
        moments=8 * (aligned + _aligned(fp32)),
    )


def _aligned(sizes: Sequence[int]) -> int:
    return sum(-(-n // ALIGN) * ALIGN for n in sizes)
