"""The latency of attention and FFN blocks by the number of units that stay, measured on this host.

For each kind of block and some numbers of units n between 1 and all:

    time(n)    of a stack of 4 such blocks, each x + block(norm(x)), over 4; the lower quartile of alternating rounds

exported for the runtime and run there, in int8 where the model will be: in torch small heads and GELU cost several
times as much relative to the rest, and a budget of such times cuts what does not make the export faster. A stack,
because a single block would find its weights in the cache and pay for a call of its own. Between the points time is
linear (costs.latency); what the blocks cost in the whole model, `prune/measured.py` scales to two whole exports.

Widths of an FFN are rounded to a multiple of s where that makes the runtime faster, not only no slower: near half of
the width all multiples of the recipe's step within 64 channels are timed, and s is the largest of 64, 32 and 16 for
which the next multiple above takes 2% less time than a width that is none (in the median over widths that the same
power of 2 divides). A CPU with AVX2 has no such s; nothing is assumed of others.
"""

from __future__ import annotations

import math
import statistics
from contextlib import ExitStack, closing

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mptrain.compress.runtime import Compiled, Runtime, in_turns
from mptrain.compress.structure.blocks import Block, Structure
from mptrain.compress.structure.costs import LatencyTable, Length, extent, head_dim, kind
from mptrain.core.progress import track

STACK = 4
COARSE = (64, 32, 16)
GAIN = 0.98
QUANTILE = 0.25


@torch.no_grad()
def measure_latency(
    structure: Structure, length: Length, runtime: Runtime, *, round_ffn: int = 1, rounds: int = 25
) -> tuple[LatencyTable, dict[str, int]]:
    """Time random blocks of the model's sizes at batch 1: the table, and by kind what widths are best a multiple of.

    Measure on one process and hand the same table to all: a structure must not differ between ranks.
    """
    wanted = {(kind(b), n): (b, n) for b in structure for n in _points(b, math.lcm(round_ffn, b.step))}
    compiled: dict[tuple[str, int], Compiled] = {}
    with torch.random.fork_rng(devices=[]), ExitStack() as stack:
        torch.manual_seed(0)
        for key, (block, units) in track(list(wanted.items()), "compiling blocks to time"):
            e = extent(length, block)
            x = torch.randn(e.tokens // e.keys, e.keys, _hidden(block))
            compiled[key] = stack.enter_context(closing(runtime.compiled(_Stack(block, units), {"x": x})))
        times = in_turns(list(compiled.values()), rounds, "timing blocks", warm=False)
    table: LatencyTable = {}
    for (name, units), seconds in zip(compiled, times, strict=True):
        table.setdefault(name, {})[str(units)] = float(np.quantile(seconds, QUANTILE)) / STACK
    combs = {kind(b): _comb(b, math.lcm(round_ffn, b.step)) for b in structure}
    steps = {name: _fast_step([(n, table[name][str(n)]) for n in comb]) for name, comb in combs.items()}
    return table, {name: step for name, step in steps.items() if step > 1}


def _hidden(block: Block) -> int:
    return block.sources[0].weights


def _points(block: Block, step: int, most: int = 6) -> list[int]:
    every = {round(x) for x in np.linspace(1, block.units, most)}
    return sorted(every | set(_comb(block, step)))


def _comb(block: Block, step: int) -> list[int]:
    """Widths near half of it: two multiples of 64, and what lies between them."""
    top = block.units // 128 * 64
    if block.kind == "heads" or top < 128 or 64 % step or step == 64:
        return []
    return list(range(top - 64, top + 1, max(step, 8)))


def _fast_step(comb: list[tuple[int, float]]) -> int:
    """1 where no multiple is worth it. comb: widths and their times, ascending."""
    seconds = dict(comb)
    for coarse in COARSE:
        alike: dict[int, list[float]] = {}  # by the largest power of 2 that divides the width
        for n in seconds:
            if n % coarse:
                alike.setdefault(n & -n, []).append(seconds[-(-n // coarse) * coarse] / seconds[n])
        if alike and all(statistics.median(ratios) < GAIN for ratios in alike.values()):
            return coarse
    return 1


class _Stack(nn.Module):
    def __init__(self, block: Block, units: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_Residual(block, units) for _ in range(STACK)))
        self.eval()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.blocks(x)}


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
