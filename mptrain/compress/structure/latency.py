"""The latency of attention and FFN blocks by the number of units that stay, measured on this host.

For each kind of block and up to 9 numbers of units n between 1 and all:

    time(n)    of a stack of 4 such blocks, each x + block(norm(x)), over 4; the median of alternating rounds

compiled by OpenVINO, where the export will run: in torch small heads and GELU cost several times as much relative
to the rest, and a budget of such times cuts what does not make the export faster. A stack, because a single block
would find its weights in the cache and pay for a call of its own. Between the points time is linear (costs.latency).
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mptrain.compress.structure.blocks import Block, Structure
from mptrain.compress.structure.costs import Extent, LatencyTable, Length, extent, head_dim, kind
from mptrain.core.progress import track

log = logging.getLogger(__name__)

STACK = 4


@torch.no_grad()
def measure_latency(
    structure: Structure, length: Length, *, batch: int = 1, threads: int | None = None, rounds: int = 15
) -> LatencyTable:
    """Time random blocks of the model's sizes, float32. threads: torch's number of threads by default.

    Without OpenVINO torch runs them, with a warning. Measure on one process and hand the same table to all: a
    structure must not differ between ranks.
    """
    threads = threads or torch.get_num_threads()
    compiled = find_spec("openvino") is not None
    if not compiled:
        log.warning("prune.keep.latency: without OpenVINO blocks are timed in torch; pip install 'mptrain[openvino]'")
    wanted = {(kind(b), n): (b, n) for b in structure for n in _points(b.units)}
    runs: dict[tuple[str, int], Callable[[], Any]] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for key, (block, units) in track(list(wanted.items()), "compiling blocks to time"):
            runs[key] = _runner(block, units, extent(length, block), batch, threads if compiled else None)
    times: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    for attempt in track(range(rounds + 1), "timing blocks"):
        for key, run in runs.items():
            begun = time.perf_counter()
            run()
            if attempt:  # the first round warms up
                times[key].append((time.perf_counter() - begun) / STACK)
    table: LatencyTable = {}
    for (name, units), seconds in times.items():
        table.setdefault(name, {})[str(units)] = statistics.median(seconds)
    return table


def _hidden(block: Block) -> int:
    return block.sources[0].weights


def _points(units: int, most: int = 9) -> list[int]:
    return sorted({max(1, round(x)) for x in np.linspace(1, units, most)})


def _runner(block: Block, units: int, e: Extent, batch: int, threads: int | None) -> Callable[[], Any]:
    """threads: of OpenVINO; None runs the blocks in torch."""
    stack = nn.Sequential(*(_Residual(block, units) for _ in range(STACK))).eval()
    x = torch.randn(batch * e.tokens // e.keys, e.keys, _hidden(block))
    if threads is None:
        return lambda: stack(x)
    import openvino as ov

    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    compiled = ov.Core().compile_model(ov.convert_model(stack, example_input=x), "CPU", options)
    request, array = compiled.create_infer_request(), x.numpy()
    return lambda: request.infer([array], share_inputs=True)


class _Residual(nn.Module):
    def __init__(self, block: Block, units: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_hidden(block))
        self.inner = _Attention(block, units) if block.kind == "heads" else _Ffn(block, units)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class _Attention(nn.Module):
    """[batch, keys, hidden] to the same; `units` heads, or key-value heads with their queries."""

    def __init__(self, block: Block, units: int) -> None:
        super().__init__()
        self.size, self.group, hidden = head_dim(block), block.heads, _hidden(block)
        columns = units * self.size
        self.q = nn.Linear(hidden, columns * self.group)
        self.k, self.v = nn.Linear(hidden, columns), nn.Linear(hidden, columns)
        self.o = nn.Linear(columns * self.group, hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.group > 1:
            k, v = (t.repeat_interleave(self.group, 1) for t in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Ffn(nn.Module):
    def __init__(self, block: Block, units: int) -> None:
        super().__init__()
        rows = sum(axis.per_unit for axis in block.sources)  # two with a gate
        self.up = nn.ModuleList(nn.Linear(_hidden(block), units) for _ in range(rows))
        self.down = nn.Linear(units, _hidden(block))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.up[0](x))
        for layer in self.up[1:]:
            y = y * layer(x)
        return self.down(y)
