"""Budgets of the whole exported model, measured on the runtime: before the cut to predict, after the choice to correct.

    dense, least     the model as it is, and with as little of every block as may stay, are exported; least costs the
                     share r of dense (seconds: the median of alternating rounds; bytes: of the files)
    predicted        constant + scale · Σ of the blocks' times alone (or parameters), through these two points: the
                     constant is what pruning does not touch. Stages that count against the same model, as
                     those of a family, share times and scale; of each the constant is that of where it starts
    measured         what was chosen is exported too, beside the dense one, and where it misses the budget by more than
                     2% the choice is made anew from all that was measured (`Budget.correct`), 3 times at most (a
                     MiniLM in int8 on a CPU with VNNI: first choices off by up to 16%, one correction by up to 12%)

The weights of what is exported are those at hand; neither time nor size depends on them.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any

from torch import nn

from mptrain.compress import boundary
from mptrain.compress.base import Tools
from mptrain.compress.prune.base import Pruner
from mptrain.compress.runtime import Compiled, Runtime, share
from mptrain.compress.structure import costs
from mptrain.compress.structure.blocks import Kept, Structure
from mptrain.compress.structure.budget import Widths
from mptrain.compress.structure.latency import measure_latency
from mptrain.core.signature import Batch

log = logging.getLogger(__name__)

ROUNDS = 31
TOLERANCE = 0.02
CORRECTIONS = 3
MISSED = 0.05


def _seconds(one: Compiled, dense: Compiled) -> float:
    return share(one, dense, ROUNDS, "timing the whole model")


READ: dict[str, Callable[[Compiled, Compiled], float]] = {
    "latency": _seconds,
    "size": lambda one, dense: one.bytes / dense.bytes,
}
"""by budget: what a model costs against the dense one"""


def _timed_blocks(structure: Structure, extents: costs.Length, runtime: Runtime, widths: Widths) -> dict[str, Any]:
    table, steps = measure_latency(structure, extents, runtime, round_ffn=widths.round_ffn)
    return {"table": table, "steps": steps}


BLOCKS: dict[str, Callable[[Structure, costs.Length, Runtime, Widths], dict[str, Any]]] = {
    "latency": _timed_blocks,
    "size": lambda structure, extents, runtime, widths: {},
}
"""by budget: what is measured of blocks alone"""


def measure(
    model: nn.Module,
    structure: Structure,
    example: Batch,
    runtime: Runtime,
    *,
    budget: str,
    extents: costs.Length,
    widths: Widths,
) -> costs.Whole:
    """What the model costs by what stays of its blocks. budget: "latency" or "size". extents: tokens, or of every
    block. Raises UserError for blocks that cannot be timed."""
    blocks = BLOCKS[budget](structure, extents, runtime, widths)
    least = widths.least(structure)
    with Beside(model, structure, example, runtime, budget) as beside:
        part = beside.share(least)
    alone = costs.Whole(1.0, 0.0, **blocks)
    dense, small = (alone.blocks(structure, kept) for kept in (Kept(), least))
    return costs.Whole.through(dense, small, part, **blocks)


def beside(model: nn.Module, tools: Tools, budget: str) -> float:
    """What the model costs, as a share of what `tools.whole` costs; 1 where there is none."""
    if tools.whole is None:
        return 1.0
    runtime, example = tools.runtime(), {name: value.cpu() for name, value in tools.example().items()}
    with (
        closing(runtime.compiled(tools.whole(), example)) as whole,
        closing(runtime.compiled(copy.deepcopy(model).cpu(), example)) as start,
    ):
        return READ[budget](start, whole)


def from_bytes(model: nn.Module, structure: Structure, each: tuple[float, float]) -> costs.Whole:
    """The same of a size, from what a weight of a layer and one of an embedding takes. model: on any device."""
    layer, embedding = each
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    total = sum(p.numel() for p in model.parameters())
    whole = (total - tables) * layer + tables * embedding
    blocks = layer * sum(costs.params(block, block.units) for block in structure)
    return costs.Whole(layer / whole, 1.0 - blocks / whole)


class Beside:
    """Exports of a model with less of its blocks, each measured beside the whole one, which is exported once.

    model: is left as it is; weights of any values. Within `with`, at whose end the whole one is freed.
    """

    def __init__(self, model: nn.Module, structure: Structure, example: Batch, runtime: Runtime, budget: str) -> None:
        self._model, self._structure = copy.deepcopy(model).cpu(), structure
        self._example = {name: value.cpu() for name, value in example.items()}
        self._runtime, self._read = runtime, READ[budget]
        self._stack = ExitStack()

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @cached_property
    def _dense(self) -> Compiled:
        return self._stack.enter_context(closing(self._runtime.compiled(self._model, self._example)))

    def share(self, kept: Kept) -> float:
        """Of what the model costs whole, what it costs with `kept` alone."""
        less = boundary.without(copy.deepcopy(self._model), self._structure, kept)
        with closing(self._runtime.compiled(less, self._example)) as one:
            return self._read(one, self._dense)


def hold(pruner: Pruner, model: nn.Module, tools: Tools, budget: str, start: float = 1.0) -> dict[str, Any]:
    """Export what was chosen, and correct the choice where it misses the budget; the pruner is then settled on the
    nearest.

    model: before the cut, on the CPU. start: of `beside`. Returns facts: {"of", "asked", "target", "predicted",
    "measured", "corrected": None, or what the first choice measured, "start"}, all as shares of the whole model.
    """
    (limit,) = pruner.budget.limits
    asked, runtime = limit.keep, tools.runtime()
    kept = pruner.kept()
    predicted = pruner.budget.fraction(kept)[budget]
    with Beside(model, pruner.structure, tools.example(), runtime, budget) as beside:
        seen = [(kept, float(tools.once(f"{budget}-chosen", lambda: beside.share(kept))))]
        for number in range(1, CORRECTIONS + 1 if asked < 1.0 else 1):  # of all of it, what is off is noise
            if min(abs(found / asked - 1.0) for _, found in seen) <= TOLERANCE:
                break
            pruner.budget.correct(asked, seen)
            again = pruner.resolve()
            if any(again == other for other, _ in seen):
                break
            found = float(tools.once(f"{budget}-corrected-{number}", partial(beside.share, again)))
            seen.append((again, found))
    nearest, measured = min(seen, key=lambda choice: abs(choice[1] - asked))
    pruner.settle(nearest)
    corrected = None if nearest is kept else start * seen[0][1]
    asked, predicted, measured = (start * share for share in (asked, predicted, measured))
    said = f"prune.keep.{budget}: {asked:.3g} of {runtime.words} asked for, {predicted:.3g} predicted"
    log.info("%s, %.3g measured", said, measured)
    if abs(measured / asked - 1.0) > MISSED:
        log.warning("%s, but %.3g is left; widths and floors allow no nearer, or this host is busy", said, measured)
    shares = {"asked": asked, "predicted": predicted, "measured": measured, "corrected": corrected, "start": start}
    return {"of": budget, "target": runtime.words, **shares}


def as_json(whole: costs.Whole) -> dict[str, Any]:
    return asdict(whole)
