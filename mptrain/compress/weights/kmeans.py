"""Weighted k-means of numbers, many groups at once: the tables of palettized weights.

For each group, find k centroids c and an assignment a that minimise Σ wᵢ (xᵢ - c[aᵢ])². In one
dimension an optimal cluster is an interval of the sorted values, and with prefix sums W and M
of wᵢ and wᵢ xᵢ the interval [i, j) costs, up to a constant,

    -(Mⱼ - Mᵢ)² / (Wⱼ - Wᵢ)

so k boundaries are found by dynamic programming. On all n values exactly that is
O(k n log n) and slow. Here

    1. values are sorted and equal ones joined (groups above 2^17 values: an adaptive histogram);
    2. coarse: the optimal boundaries on some hundred cells whose density is the cube root of
       that of the values, as the density of optimal centroids is (Panter and Dite 1951): the sum
       of ∛(weight · gap²) over the gaps between neighbours is the same in each;
    3. local: the optimum among 17 places around each boundary, in ever smaller steps, until no
       boundary moves at full resolution.

The sum of squares is within 1.0005 of the exact minimum (1.005 with very uneven weights), and
exact for no more distinct values than cells: 256, or 4,096 / k with 1 to 3 bits, where they cost
little, and where one group in a wrong valley shows in a small model's perplexity. Results are
deterministic and do not depend on the number of threads.

On a CPU with a compiler this is one C call, a group to a thread. Elsewhere the same steps run on
torch operations, without the histogram and with fewer cells above 5 bits (within 1.02).
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from mptrain.core import native

MAX_BITS = 8
_CELLS = 256
_REACH = 8  # candidates to either side of a boundary
_ROUNDS = 40
_CHUNK = 1 << 20  # values that the torch operations sort at once


def cluster(
    values: Tensor, bits: int, weights: Tensor | None = None, *, compiled: bool = True
) -> tuple[Tensor, Tensor]:
    """Centroids and assignment of every group.

    values: [groups, n], floating point, finite. bits: 1 to 8, for k = 2**bits.
    weights: importance of each value, same shape, finite, ≥ 0; a group whose weights are all
    zero counts every value alike. compiled: False keeps to torch operations.
    Returns (centroids [groups, k] float32, ascending; indices [groups, n] uint8, of the nearest
    centroid). With fewer distinct values than k the last centroid is repeated.
    Raises ValueError for anything else.
    """
    if values.dim() != 2 or not values.numel() or not values.is_floating_point():
        raise ValueError(f"values must be floating point [groups, n], got {values.dtype} {list(values.shape)}")
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be 1 to {MAX_BITS}, got {bits}")
    if weights is not None and weights.shape != values.shape:
        raise ValueError(f"weights must have the shape of the values {list(values.shape)}, got {list(weights.shape)}")
    values = values.detach().float().contiguous()
    _check("values", values)
    if weights is not None:
        weights = weights.detach().to(values.device, torch.float32).contiguous()
        if _check("weights", weights) < 0:
            raise ValueError("weights must not be negative")
    source = Path(__file__).with_suffix(".c")
    kernel = native.load(source, "k-means") if compiled and values.device.type == "cpu" else None
    if kernel is not None:
        return _native(kernel, values, bits, weights)
    rows = max(1, _CHUNK // values.shape[1])
    parts = [
        _torch(values[at : at + rows], 2**bits, None if weights is None else weights[at : at + rows])
        for at in range(0, len(values), rows)
    ]
    return torch.cat([table for table, _ in parts]), torch.cat([indices for _, indices in parts])


def cluster_cost(groups: int, n: int, bits: int) -> float:
    """Of `cluster` on n values in each group, about proportional to its time on a core."""
    return groups * (2.0 * n + 2**bits * _cells(bits))


def _cells(bits: int) -> int:
    return max(_CELLS, 8 * 2**bits, 4096 >> bits)


def _check(name: str, tensor: Tensor) -> float:
    """The smallest element of a tensor whose elements must be finite."""
    low, high = tensor.aminmax()
    if not bool(torch.isfinite(low)) or not bool(torch.isfinite(high)):
        count = int((~torch.isfinite(tensor)).sum())
        raise ValueError(f"{name} must be finite: {count} of {tensor.numel()} are inf or NaN")
    return float(low)


# -- compiled


def _native(kernel: ctypes.CDLL, values: Tensor, bits: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    groups, n = values.shape
    table = torch.empty(groups, 2**bits)
    indices = torch.empty(groups, n, dtype=torch.uint8)
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (values, weights, table, indices)]
    sizes = [ctypes.c_int64(groups), ctypes.c_int64(n), ctypes.c_int(bits), ctypes.c_int(_cells(bits))]
    if kernel.kmeans(*pointers[:2], *sizes, *pointers[2:]):
        raise MemoryError(f"k-means of {groups} groups of {n} values")
    return table, indices


# -- torch operations


def _torch(values: Tensor, clusters: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    x, order = values.sort(1)
    if weights is None:
        w = torch.ones_like(x, dtype=torch.float64)
    else:
        w = weights.gather(1, order).double()
        mean = w.mean(1, keepdim=True)
        w += torch.where(mean > 0, 1e-9 * mean, 1.0)  # values without importance still have a place
    del order
    centre = (w * x).sum(1, keepdim=True) / w.sum(1, keepdim=True)
    moments = _prefix_sums(w * (x.double() - centre))
    w = _prefix_sums(w)
    bounds, steps = _coarse_search(_edges(x, w, max(_CELLS, 2 * clusters)), w, moments, clusters)
    for _ in range(_ROUNDS if clusters > 1 else 0):
        found = _local_search(bounds, steps, w, moments)
        done = torch.equal(found, bounds) and not bool((steps > 1).any())
        bounds, steps = found, (steps + 3) // 4
        if done:
            break
    weight, moment = w.gather(1, bounds).diff(dim=1), moments.gather(1, bounds).diff(dim=1)
    table = torch.where(weight > 0, centre + moment / weight.clamp_min(1e-300), -torch.inf)
    table = table.cummax(1).values  # an empty cluster repeats the one before it
    first = table.masked_fill(table == -torch.inf, torch.inf).amin(1, keepdim=True)
    table = torch.where(table == -torch.inf, first, table).float()
    middle = (0.5 * (table[:, 1:].double() + table[:, :-1].double())).float()
    return table, torch.searchsorted(middle, values, out_int32=True).to(torch.uint8)


def _prefix_sums(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.cumsum(1), (1, 0))


def _cost(weight: Tensor, moment: Tensor) -> Tensor:
    cost = -(moment * moment) / weight.clamp_min(1e-300)
    return cost.masked_fill_(weight == 0, 0.0).masked_fill_(weight < 0, torch.inf)


def _edges(x: Tensor, w: Tensor, cells: int) -> Tensor:
    """Ascending positions [groups, cells + 1] from 0 to n, in ascending values `x` with prefix weights `w`."""
    groups, n = x.shape
    if n <= cells:
        return torch.arange(n + 1, device=x.device).expand(groups, -1).contiguous()
    gaps = x.double().diff(dim=1)
    spread = ((w[:, 2:] - w[:, :-2]) * gaps * gaps).pow_(1 / 3)
    share = torch.full_like(spread[:, :1], torch.inf)
    for _ in range(20):
        spread = spread.minimum(share)  # a gap has one edge, however wide it is
        share = spread.sum(1, keepdim=True) / cells
        if not bool((spread > 1.5 * share).any()):
            break
    spread = _prefix_sums(spread)
    levels = torch.linspace(0, 1, cells + 1, dtype=torch.float64, device=x.device)[1:-1]
    inner = torch.searchsorted(spread, spread[:, -1:] * levels)
    edges = torch.nn.functional.pad(inner, (1, 0))
    edges = torch.nn.functional.pad(edges, (0, 1), value=n)
    few = (gaps != 0).sum(1) < cells
    if bool(few.any()):  # every distinct value is a cell
        places = torch.arange(1, n, device=x.device).where(gaps[few] != 0, n)
        edges[few, 1:] = places.topk(cells, largest=False).values.sort(1).values
    return edges


def _coarse_search(edges: Tensor, w: Tensor, moments: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Optimal boundaries [groups, clusters + 1] on the edges; the local search's steps [groups, clusters - 1]."""
    rows = max(1, (1 << 23) // edges.shape[1] ** 2)
    chosen = torch.cat(
        [_optimum(w.gather(1, e), m.gather(1, e), clusters)
         for e, w, m in zip(edges.split(rows), w.split(rows), moments.split(rows))]
    )  # fmt: skip
    bounds = edges.gather(1, chosen)
    widths = torch.nn.functional.pad(edges.diff(dim=1), (1, 1))
    inside = chosen[:, 1:-1]
    widest = torch.maximum(widths.gather(1, inside), widths.gather(1, inside + 1))
    return bounds, ((widest + _REACH - 1) // _REACH).clamp_min(1)


def _optimum(w: Tensor, m: Tensor, clusters: int) -> Tensor:
    """Indices [groups, clusters + 1] of the edges, with prefix sums [groups, edges], between which clusters lie."""
    cost = _cost(w[:, :, None] - w[:, None, :], m[:, :, None] - m[:, None, :])  # [group, end, start]
    last = w.shape[1] - 1
    cost.masked_fill_(torch.ones_like(cost[0], dtype=torch.bool).triu(1), torch.inf)
    total, choices = cost[:, :, 0], []
    for _ in range(clusters - 1):
        total, choice = (cost + total[:, None, :]).min(2)
        choices.append(choice)
    chosen = [torch.full_like(w[:, :1], last, dtype=torch.long)]
    for choice in reversed(choices):
        chosen.append(choice.gather(1, chosen[-1]))
    chosen.append(torch.zeros_like(chosen[0]))
    return torch.cat(chosen[::-1], 1)


def _local_search(bounds: Tensor, steps: Tensor, w: Tensor, moments: Tensor) -> Tensor:
    """The best boundaries among 2 reach + 1 places around each."""
    groups, last = len(bounds), w.shape[1] - 1
    around = torch.arange(-_REACH, _REACH + 1, device=w.device)
    places = (bounds[:, 1:-1, None] + steps[:, :, None] * around).clamp(0, last)  # [group, boundary, place]
    weight = w.gather(1, places.flatten(1)).view_as(places)
    moment = moments.gather(1, places.flatten(1)).view_as(places)
    total, choices = _cost(weight[:, 0], moment[:, 0]), []
    for c in range(1, places.shape[1]):
        between = _cost(
            weight[:, c, :, None] - weight[:, c - 1, None, :], moment[:, c, :, None] - moment[:, c - 1, None, :]
        )
        total, choice = (between + total[:, None, :]).min(2)
        choices.append(choice)
    at = (total + _cost(w[:, -1:] - weight[:, -1], moments[:, -1:] - moment[:, -1])).argmin(1, keepdim=True)
    chosen = [at]
    for choice in reversed(choices):
        chosen.append(choice.gather(1, chosen[-1]))
    picked = torch.stack(chosen[::-1], 1)
    found = bounds.clone()
    found[:, 1:-1] = places.gather(2, picked).view(groups, -1)
    return found
