"""What fp16 does not hold of values that come in pieces: how large they are, and which parts overflow or become 0."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HALF_MAX = 65504.0
HALF_TINY = 2.0**-14
"""least normal fp16, 6.1e-5; below it precision is lost"""
HALF_LEAST = 2.0**-24
"""least fp16 above 0, 6.0e-8; half of it and less rounds to 0"""


@dataclass(frozen=True)
class Range:
    """Values of one op over all batches, in fp32. Fractions are of the values that are finite and not 0."""

    largest: float
    """|x|; infinite ones are not counted"""
    overflow: float
    zero: float
    """made 0 by fp16"""
    subnormal: float
    """below 6.1e-5, with those made 0"""


class Meter:
    """Range of values that come in pieces."""

    def __init__(self) -> None:
        self.largest = 0.0
        self.broken = 0
        self.counts = torch.zeros(4, dtype=torch.int64)  # of values other than 0, too large, made 0, subnormal

    def add(self, value: Tensor) -> None:
        x = value.detach().abs()
        broken = broken_in(x)
        self.broken += broken
        if broken:
            x = torch.where(torch.isfinite(x), x, 0.0)
        if x.numel():
            self.largest = max(self.largest, float(x.max()))
            nonzero = int(torch.count_nonzero(x))
            zeros = x.numel() - nonzero
            large, lost, small = (
                int(torch.count_nonzero(b)) for b in (x > HALF_MAX, x <= HALF_LEAST / 2, x < HALF_TINY)
            )
            self.counts += torch.tensor([nonzero, large, lost - zeros, small - zeros])

    def range(self) -> Range:
        total, *parts = self.counts.tolist()
        return Range(self.largest, *(part / max(total, 1) for part in parts))


def broken_in(value: Tensor) -> int:
    return value.numel() - int(torch.count_nonzero(torch.isfinite(value)))
