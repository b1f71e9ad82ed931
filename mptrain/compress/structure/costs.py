"""What a block costs when n of its units stay: parameters, multiply-adds (MACs), latency.

With u units, T tokens and K keys that a token looks at (and none at all for u = 0, but the constants of dropped.py):

    parameters   fixed (the bias of a sink) + u · (elements of every axis to a unit)
    MACs         u · (T · elements of sources and sinks to a unit, plus for heads 2 · T · K · columns of a sink)
                 or, with an example, what the matrices and attentions of a forward pass really multiply
    latency      a small table measured on this host (latency.py), between its points linear
    of the whole exported model, in seconds or bytes: constant + scale · Σ of the blocks' latency or parameters

MACs leave out biases, norms, softmax and activations, as is usual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mptrain.compress.structure.blocks import Axis, Block, Kept, Structure
from mptrain.compress.structure.counting import Counter
from mptrain.compress.structure.crossings import Crossings
from mptrain.core.errors import UserError

LatencyTable = dict[str, dict[str, float]]
"""Seconds by block kind and units: {"ffn/384/1": {"192": 0.0011, …}, …}; goes into JSON as it is."""


@dataclass(frozen=True)
class Extent:
    """Per example: tokens that go through a block, keys that each of them looks at, and MACs of one unit.

    parameters: MACs with each whole parameter that the block cuts.
    """

    tokens: int
    keys: int
    macs: float
    parameters: Mapping[str, float] = field(default_factory=dict)


Length = int | Mapping[str, Extent]
"""Sequence length, or the extents of every block by name where blocks differ (images, audio, encoder-decoders)."""


def extent(length: Length, block: Block) -> Extent:
    if not isinstance(length, int):
        return length[block.name]
    weights = sum(axis.per_unit * axis.weights // axis.parts for axis in block.of_role("source", "sink"))
    columns = sum(axis.per_unit for axis in block.sinks) if block.kind == "heads" else 0
    by = {axis.parameter: float(length * axis.size * axis.weights) for axis in block.of_role("source", "sink")}
    return Extent(length, length, length * (weights + 2 * length * columns), by)


@torch.no_grad()
def measure_extents(model: nn.Module, structure: Structure, example: Mapping[str, Tensor]) -> dict[str, Extent]:
    """Extents of every block, counted in one forward pass of `example` (any batch size)."""
    batch = next(iter(example.values())).shape[0]
    shapes: dict[str, torch.Size] = {}

    def reader(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs:
                shapes.setdefault(name, inputs[0].shape)

        return hook

    firsts = {block.name: block.sources[0].parameter.rpartition(".")[0] for block in structure}
    handles = [model.get_submodule(m).register_forward_pre_hook(reader(name)) for name, m in firsts.items()]
    training = model.training
    counter = Counter(model, {core: block.name for block in structure for core in block.cores})
    try:
        with counter:
            model.eval()(**example)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    found = {}
    for block in structure:
        shape = shapes.get(block.name, torch.Size((batch, 1, 1)))
        total = counter.inside[block.name] / block.units
        for axis in block.of_role("source", "sink"):
            total += counter.of[axis.parameter] * axis.per_unit / axis.size / axis.parts
        by = {axis.parameter: counter.of[axis.parameter] / batch for axis in block.of_role("source", "sink")}
        tokens = shape.numel() // shape[-1] // batch
        found[block.name] = Extent(tokens, min(tokens, shape[-2]), total / batch, by)
    return found


def params(block: Block, units: int) -> int:
    return block.fixed_params + units * block.unit_params if units else block.empty_params


def macs(block: Block, units: int, length: Length) -> int:
    """For one example."""
    return round(extent(length, block).macs * units)


def params_of(block: Block, axis: Axis) -> float:
    """Of the whole parameter of an axis."""
    return axis.size * axis.weights


def macs_of(block: Block, axis: Axis, length: Length) -> float:
    """For one example, of the whole parameter of an axis; biases and norms have none."""
    return 0.0 if axis.role == "side" else extent(length, block).parameters.get(axis.parameter, 0.0)


def latency(block: Block, units: int, table: LatencyTable) -> float:
    """Seconds, interpolated; never less for more units, however the clock jittered. Without a unit there is nothing to
    compute."""
    if not units:
        return 0.0
    points = sorted((int(n), seconds) for n, seconds in table[kind(block)].items())
    seconds = np.maximum.accumulate([s for _, s in points])
    return float(np.interp(units, [n for n, _ in points], seconds))


@dataclass(frozen=True)
class Whole:
    """What an exported model costs, in parts of what it costs uncut: constant + scale · Σ over its blocks.

    constant: what pruning does not touch: embeddings, norms, head. table: seconds of blocks; empty, their parameters
    count. steps: by kind of block, the multiple that widths are rounded to. In JSON types.
    """

    scale: float
    constant: float
    table: LatencyTable = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)

    @classmethod
    def through(cls, dense: float, least: float, share: float, **more: Any) -> Whole:
        """dense, least: sums over the blocks of the uncut model, and of one that costs `share` of it."""
        scale = max(0.0, 1.0 - share) / (dense - least) if dense > least else 0.0  # nothing can go
        return cls(scale, 1.0 - scale * dense, **more)

    def seen_from(self, structure: Structure, start: float) -> Whole:
        """The same in parts of a smaller model's cost, which is `start` of this one's. structure: of the smaller."""
        dense = replace(self, scale=1.0).blocks(structure, Kept())
        scale = min(self.scale / start, 1.0 / dense) if dense > 0 else 0.0
        return replace(self, scale=scale, constant=1.0 - scale * dense)

    def of(self, block: Block, units: int) -> float:
        return self.scale * (latency(block, units, self.table) if self.table else params(block, units))

    def weight(self, block: Block, axis: Axis) -> float:
        """Of the whole parameter of an axis; times of blocks that share one are not known."""
        return 0.0 if self.table else self.scale * params_of(block, axis)

    def blocks(self, structure: Structure, kept: Kept) -> float:
        """Of all blocks with `kept` alone."""
        counts = {block.name: kept.count(block) for block in structure}
        shares = sum(self.of(block, counts[block.name]) for block in structure)
        return shares - Crossings(structure, self.weight).more(counts)

    def step(self, block: Block) -> int:
        return self.steps.get(kind(block), 1) if self.steps else 1


def layer_costs(structure: Structure, length: Length, kept: Kept | None = None) -> list[dict[str, Any]]:
    """One row per layer: {"layer", "heads" (query heads), "ffn" (channels), "params", "macs"}."""
    kept = kept or Kept()
    return [
        {
            "layer": layer,
            "heads": sum(kept.count(b) * b.heads for b in blocks),
            "ffn": sum(kept.count(b) for b in blocks if b.kind != "heads"),
            "params": sum(params(b, kept.count(b)) for b in blocks),
            "macs": sum(macs(b, kept.count(b), length) for b in blocks),
        }
        for layer, blocks in structure.layers().items()
    ]


def describe(structure: Structure, kept: Kept) -> dict[str, Any]:
    """The `structure` entry of report.json: what stays of the dense `structure`, by layer and by block.

    {"family", "layers": [{"layer", "heads", "heads_total", "ffn", "ffn_total", "params", "params_total"}],
    "blocks": [{"name", "kind", "layer", "kept", "total", "params", "params_total"}], "refused": [{"what", "reason"}]}.
    Heads are those of queries: their indices, where a layer has one attention, else how many.
    """
    layers = []
    for layer, blocks in structure.layers().items():
        attentions = [b for b in blocks if b.kind == "heads"]
        heads = [[u * b.heads + i for u in kept.of(b) for i in range(b.heads)] for b in attentions]
        layers.append(
            {
                "layer": layer,
                "heads": heads[0] if len(heads) == 1 else sum(len(h) for h in heads),
                "heads_total": sum(b.units * b.heads for b in attentions),
                "ffn": sum(kept.count(b) for b in blocks if b.kind != "heads"),
                "ffn_total": sum(b.units for b in blocks if b.kind != "heads"),
                "params": sum(params(b, kept.count(b)) for b in blocks),
                "params_total": sum(params(b, b.units) for b in blocks),
            }
        )
    rows = [
        {
            "name": b.name,
            "kind": b.kind,
            "layer": b.layer,
            "kept": kept.count(b),
            "total": b.units,
            "params": params(b, kept.count(b)),
            "params_total": params(b, b.units),
        }
        for b in structure
    ]
    refused = [{"what": r.what, "reason": r.reason} for r in structure.refused]
    return {"family": structure.name, "layers": layers, "blocks": rows, "refused": refused}


def kind(block: Block) -> str:
    """Blocks of one kind take the same time for the same units. Raises UserError for those that cannot be timed."""
    first = block.sources[0]
    if block.step > 1:
        raise UserError(f"prune.keep.latency: {block.name} holds channels of experts, whose time is not measured here")
    if block.kind == "heads":
        return f"attention/{first.weights}/{head_dim(block)}/{block.heads}"
    if block.kind == "ffn":
        return f"ffn/{first.weights}/{sum(axis.per_unit for axis in block.sources)}"
    raise UserError(f"prune.keep.latency: {block.name} holds channels of convolutions, whose time is not measured here")


def head_dim(block: Block) -> int:
    return block.sinks[0].per_unit // block.heads
