"""Weighted k-means of short vectors, many groups at once: tables whose entries are `dim` numbers.

For each group, find k centroids c and an assignment a that make

    Σᵢ Σⱼ wᵢⱼ (xᵢⱼ - c[aᵢ]ⱼ)²        (every number has its own importance)

small: k-means++ (Arthur and Vassilvitskii 2007), seeded, then Lloyd's steps until the sum no
longer falls. Two matrix products give the distances, Σⱼ wⱼ cⱼ² - 2 Σⱼ wⱼ xⱼ cⱼ up to a constant;
a centroid is the weighted mean of its cluster, number by number. An empty cluster takes over
the vector that is worst served.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 100
_ENOUGH = 1e-5  # relative fall of the sum of squares in a step
_SEEDED_FROM = 1 << 15  # vectors that k-means++ looks at, at most
_DISTANCES = 1 << 23  # held at once


def cluster_vectors(
    values: Tensor, bits: int, weights: Tensor | None = None, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Centroids and assignment of every group.

    values: [groups, n, dim], floating point, finite. weights: same shape, finite, ≥ 0, or None.
    Returns (centroids [groups, 2**bits, dim] float32; indices [groups, n] uint8). The same seed
    gives the same result. Raises ValueError for values or weights that are not finite or negative.
    """
    found = [
        _cluster(
            x.detach().float(), 2**bits, None if weights is None else weights[g].detach().to(x.device).float(), seed
        )
        for g, x in enumerate(values)
    ]
    return torch.stack([table for table, _ in found]), torch.stack([indices for _, indices in found])


def _cluster(x: Tensor, clusters: int, weights: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    w = torch.ones_like(x) if weights is None else weights
    if not bool(torch.isfinite(x).all()) or not bool(torch.isfinite(w).all()) or bool((w < 0).any()):
        raise ValueError("values and weights must be finite, and weights not negative")
    mean = w.double().mean()
    w = (w / mean + 1e-6).float() if mean > 0 else torch.ones_like(x)  # without importance there is still a place
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randperm(len(x), generator=generator)[:_SEEDED_FROM].to(x.device)
    table = _plus_plus(x[picked], w[picked], clusters, generator)
    before = torch.inf
    for _ in range(_STEPS):
        indices, errors = _assign(x, w, table)
        total = float(errors.double().sum())
        if total >= before * (1 - _ENOUGH):
            break
        before = total
        table = _means(x, w, indices, errors, clusters)
    return table, _assign(x, w, table)[0].to(torch.uint8)


def _plus_plus(x: Tensor, w: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Each centroid is drawn with the probability of its distance to those before it."""
    chosen: list[Tensor] = []
    nearest = w.sum(1).double()
    for _ in range(clusters):
        draw = torch.rand((), generator=generator, dtype=torch.float64).to(x.device)
        sums = nearest.cumsum(0)
        at = torch.searchsorted(sums, sums[-1] * draw, right=True).clamp_(max=len(x) - 1)
        chosen.append(x[at])
        distance = (w * (x - x[at]).square()).sum(1).double()
        nearest = torch.minimum(nearest, distance) if len(chosen) > 1 else distance
    return torch.stack(chosen)


def _assign(x: Tensor, w: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of every vector, and the weighted squares that it leaves."""
    squares = table.square().T
    rows = max(1, _DISTANCES // len(table))
    found = [
        torch.addmm((b * a) @ table.T, b, squares, beta=-2.0).argmin(1) for a, b in zip(x.split(rows), w.split(rows))
    ]
    indices = torch.cat(found)
    return indices, (w * (x - table[indices]).square()).sum(1)


def _means(x: Tensor, w: Tensor, indices: Tensor, errors: Tensor, clusters: int) -> Tensor:
    weight = x.new_zeros((clusters, x.shape[1]), dtype=torch.float64)
    total = weight.clone()
    weight.index_add_(0, indices, w.double())
    total.index_add_(0, indices, (w * x).double())
    table = (total / weight).float()
    empty = (weight[:, 0] == 0).nonzero().flatten()
    if len(empty):
        worst = errors.topk(min(len(empty), len(errors))).indices
        table[empty] = x[worst[torch.arange(len(empty), device=x.device) % len(worst)]]
    return table
