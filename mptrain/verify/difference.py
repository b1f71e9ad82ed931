"""How far outputs are from a reference, as JSON too."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

MAX_ERROR = 0.05
"""of a row of an output, relative to its norm; a cosine of 0.999"""

_AT_A_TIME = 2**20  # values


@dataclass(frozen=True)
class Difference:
    """Outputs against the fp32 reference, the worst of all batches and outputs.

    error: largest |a - b|₂ / max(|b|₂, its root mean square over rows), over rows; cosine: of whole outputs.
    """

    finite: bool
    cosine: float
    max_diff: float
    error: float

    def right(self, max_error: float = MAX_ERROR) -> bool:
        return self.finite and self.error <= max_error


def as_json(difference: Difference) -> dict[str, Any]:
    """None for what is not finite."""
    return {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in asdict(difference).items()}


def compare(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> Difference:
    """Over all outputs; where the reference is not finite nothing is compared."""
    return worst(of_tensors(expected[name], got[name]) for name in expected)


def worst(differences: Iterable[Difference]) -> Difference:
    found = list(differences)
    return Difference(
        all(d.finite for d in found),
        min((d.cosine for d in found), default=1.0),
        max((d.max_diff for d in found), default=0.0),
        max((d.error for d in found), default=0.0),
    )


def of_tensors(expected: Tensor, got: Tensor) -> Difference:
    """Of one output, [..., d]; in float64, and of few rows at a time, for logits are large."""
    width = max(1, expected.shape[-1]) if expected.dim() else 1
    at_once = max(1, _AT_A_TIME // width)
    norms, apart = [], []
    product = largest = 0.0
    for a, b in zip(expected.reshape(-1, width).split(at_once), got.reshape(-1, width).split(at_once), strict=True):
        known = torch.isfinite(a)
        if not torch.isfinite(b[known]).all():
            return Difference(False, 0.0, float("inf"), float("inf"))
        a, b = (torch.where(known, x.double(), 0.0) for x in (a, b))
        product += float((a * b).sum())
        norms.append(torch.stack([a.norm(dim=1), b.norm(dim=1)]))
        apart.append((a - b).norm(dim=1))
        largest = max(largest, float((a - b).abs().max()) if a.numel() else 0.0)
    if not expected.numel():
        return Difference(True, 1.0, 0.0, 0.0)
    (ours, theirs), differences = torch.cat(norms, 1), torch.cat(apart)
    floor = ours.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    errors = differences / ours.clamp_min(floor)
    lengths = float(ours.norm() * theirs.norm())
    cosine = product / lengths if lengths > 0 else float(largest == 0.0)
    return Difference(True, cosine, largest, float(errors.max()))
