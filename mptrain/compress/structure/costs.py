"""What a block costs when n of its units stay: parameters, multiply-adds (MACs), latency.

With u units of d columns each, T tokens and K keys that a token looks at:

    parameters   fixed (output bias) + u · (rows and biases of q, k, v or fc_in, columns of o or fc_out)
    MACs         T · u · (weights of a unit), plus for attention 2 · T · K · (query heads · d)
    latency      a small table measured on this host (latency.py), between its points linear

MACs leave out biases, norms, softmax and activations, as is usual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mptrain.compress.structure.blocks import Attention, Block, Kept, Structure

LatencyTable = dict[str, dict[str, float]]
"""Seconds by block kind and units: {"ffn/384/1": {"192": 0.0011, …}, …}; goes into JSON as it is."""


@dataclass(frozen=True)
class Extent:
    """Per example: tokens that go through a block and keys that each of them looks at."""

    tokens: int
    keys: int


Length = int | Mapping[int, Extent]
"""Sequence length, or the extents of every block index where blocks differ (images, audio)."""


def extent(length: Length, block: Block) -> Extent:
    return Extent(length, length) if isinstance(length, int) else length[block.index]


@torch.no_grad()
def measure_extents(model: nn.Module, structure: Structure, example: Mapping[str, Tensor]) -> dict[int, Extent]:
    """Extents of every layer, read from one forward pass of `example` (any batch size)."""
    batch = next(iter(example.values())).shape[0]
    found: dict[int, Extent] = {}

    def reader(index: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            shape = inputs[0].shape
            found[index] = Extent(inputs[0].numel() // shape[-1] // batch, shape[-2])

        return hook

    handles = [model.get_submodule(a.q).register_forward_pre_hook(reader(a.index)) for a in structure.attention]
    training = model.training
    try:
        model.eval()(**example)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found


def params(block: Block, units: int) -> int:
    return block.fixed_params + units * block.unit_params


def macs(block: Block, units: int, length: Length) -> int:
    """For one example."""
    e = extent(length, block)
    if isinstance(block, Attention):
        weights = block.head_dim * block.hidden * 2 * (block.group + 1)
        return e.tokens * units * (weights + 2 * e.keys * block.columns)
    return e.tokens * units * block.hidden * (len(block.fc_in) + 1)


def latency(block: Block, units: int, table: LatencyTable) -> float:
    """Seconds, interpolated; never less for more units, however the clock jittered."""
    points = sorted((int(n), seconds) for n, seconds in table[kind(block)].items())
    seconds = np.maximum.accumulate([s for _, s in points])
    return float(np.interp(units, [n for n, _ in points], seconds))


def layer_costs(structure: Structure, length: Length, kept: Kept | None = None) -> list[dict[str, Any]]:
    """One row per layer: {"layer", "index", "heads" (query heads), "ffn", "params", "macs"}."""
    kept = kept or Kept()
    rows = []
    for a, f in zip(structure.attention, structure.ffn):
        units, channels = kept.count("heads", a), kept.count("ffn", f)
        rows.append(
            {
                "layer": a.layer,
                "index": a.index,
                "heads": units * a.group,
                "ffn": channels,
                "params": params(a, units) + params(f, channels),
                "macs": macs(a, units, length) + macs(f, channels, length),
            }
        )
    return rows


def describe(structure: Structure, kept: Kept) -> dict[str, Any]:
    """The `structure` entry of report.json: what stays of each layer of the dense `structure`."""
    layers = []
    for a, f in zip(structure.attention, structure.ffn):
        units = kept.heads.get(a.index, list(range(a.units)))
        heads = [u * a.group + i for u in units for i in range(a.group)]
        channels = kept.count("ffn", f)
        layers.append(
            {
                "layer": a.layer,
                "heads": heads,
                "heads_total": a.heads,
                "ffn": channels,
                "ffn_total": f.width,
                "params": params(a, len(units)) + params(f, channels),
                "params_total": params(a, a.units) + params(f, f.units),
            }
        )
    return {"family": structure.family, "layers": layers}


def kind(block: Block) -> str:
    """Blocks of one kind take the same time for the same units."""
    if isinstance(block, Attention):
        return f"attention/{block.hidden}/{block.head_dim}/{block.group}"
    return f"ffn/{block.hidden}/{len(block.fc_in)}"
