"""How long weight-only quantization takes, predicted from sizes and a moment of each kind of work on this machine.

    multiply-adds   tokens · Σ (2 · out · in)   each layer runs twice (layerwise.py)
                    tokens · Σ in²              second moments, once for layers that share their input
                    3 · tokens · Σ out · in     of a size budget: gradients of the loss
    gptq            a · in + b · out · in       seconds, a and b from two small weights
    scale, rtn      c · out · in                from one

A convolution counts as a Linear that runs once to a token: at how many places it runs only the inputs tell. With groups
each has columns of its own. A Cholesky factor of in³ float64 multiply-adds is a tenth of a GPTQ of the same layer and
counted with it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from mptrain.compress.weights import records
from mptrain.compress.weights.gptq import factor, gptq
from mptrain.compress.weights.grid import AUTO, Grid, round_to_nearest
from mptrain.compress.weights.scale_search import search
from mptrain.compress.weights.weight_only import Choice, choices
from mptrain.recipe import WeightOnly


@dataclass(frozen=True)
class Work:
    """macs: multiply-adds of forward passes, moments and gradients. columns, weights: of what each method rounds."""

    macs: int
    columns: dict[str, int]
    weights: dict[str, int]


def predicted_seconds(model: nn.Module, config: WeightOnly, tokens: int, macs_per_second: float) -> float:
    """model: as for `choices`, also on the meta device. tokens: of all calibration inputs."""
    found = work(model, config, tokens)
    total = found.macs / macs_per_second
    grid = Grid.fitting(max(AUTO), config.bits, config.granularity, config.block_size, config.symmetric)
    for method, count in found.weights.items():
        column, weight = _unit_seconds(method, grid)
        total += column * found.columns[method] + weight * count
    return total


def work(model: nn.Module, config: WeightOnly, tokens: int) -> Work:
    """What `compress` does, counted. Raises as `choices` does."""
    plan = choices(model, config)
    sizes = {name: _matrix_shape(model, name, choice) for name, choice in plan.items()}
    calibrated = [name for name, choice in plan.items() if choice.layer and choice.method in ("gptq", "scale")]
    passes = 2 * bool(calibrated) + 3 * (config.size_budget is not None)
    layers = sum(rows * columns for name, (rows, columns) in sizes.items() if plan[name].layer)
    moments: dict[tuple[str, int], int] = {}
    for name in calibrated:  # of one module, as query, key and value are
        owner = (plan[name].layer or "").rpartition(".")[0]
        moments[owner, sizes[name][1]] = sizes[name][1] ** 2
    columns: dict[str, int] = {}
    weights: dict[str, int] = {}
    for name, (rows, width) in sizes.items():
        method = plan[name].method if name in calibrated or plan[name].method == "rtn" else "scale"
        columns[method] = columns.get(method, 0) + plan[name].groups * width
        weights[method] = weights.get(method, 0) + rows * width
    return Work(tokens * (passes * layers + sum(moments.values())), columns, weights)


def _matrix_shape(model: nn.Module, name: str, choice: Choice) -> tuple[int, int]:
    rows, columns = records.matrix(model.get_parameter(name), choice.transposed).shape
    return rows, columns


def _unit_seconds(method: str, grid: Grid) -> tuple[float, float]:
    """(a column, a weight) of a method on this machine."""
    sizes = (64, 4 * grid.block_size), (512, 4 * grid.block_size)
    (few, width), (many, _) = sizes
    one, two = (min(_timed(method, grid, rows, columns) for _ in range(2)) for rows, columns in sizes)
    weight = max(two - one, 0.0) / ((many - few) * width)
    return max(one - weight * few * width, 0.0) / width, weight


def _timed(method: str, grid: Grid, rows: int, columns: int) -> float:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(2 * columns, columns, generator=generator)
    begun = time.perf_counter()
    if method == "gptq":
        gptq(weight, grid, factor((inputs.T @ inputs)[None], grid.block(columns))[0])
    elif method == "scale":
        search(weight, grid, inputs.square().mean(0))
    else:
        round_to_nearest(weight, grid)
    return time.perf_counter() - begun
