"""Which layers int8 must leave alone: the fewest that, back in float, bring a score within a limit, and of these the
fewest operations.

    unit      quantizers that go together: on the weights of a layer, on its input, and on all else that reads the same
    rank      one pass over the calibration inputs with each unit in float and the others quantized: by how much the
              squared error of the outputs falls. Errors of units are nearly independent, so these parts add up
    search    score with the first k units of this order in float; k by bisection
    thin      score without one of them, the least first, at most as often as the bisection did
    inside    of layers that compute several quantized operations, the same once more with their operations: ranked by
              how much the error rises where one is quantized and the others are not, then bisected and thinned
    confirm   the model quantized anew with these layers and operations ignored, as a recipe that names them would be.
              Ranges and corrections are others then; while it loses too much, further units of the order are added

Only search, thin, inside and confirm score on the task's data; the number of scores grows with the logarithm of the
layers. (nncf.quantize_with_accuracy_control ranks and restores by scores alone.)
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.compress.quantize.operations import Record, recorded
from mptrain.compress.quantize.units import Unit, units
from mptrain.compress.structure.scopes import is_operation, resolve, resolve_operations
from mptrain.core.errors import NotFinite, UserError
from mptrain.core.patch import computing
from mptrain.core.progress import progress
from mptrain.core.signature import by_name, without_cache
from mptrain.data.tasks.metrics import Score, drop

log = logging.getLogger(__name__)

Outputs = Mapping[str, Tensor]


def search(
    model: nn.Module,
    quantized: Callable[[list[str]], nn.Module],
    batches: Sequence[Mapping[str, Tensor]],
    score: Callable[[nn.Module], Score],
    max_drop: float,
) -> dict[str, Any]:
    """What to write as `ignore`, and how it was found, in JSON types.

    model: in float. quantized: a copy of it with quantizers, but for modules of these patterns. batches: inputs to
    rank on. score: of a model, on data that nothing else is judged by. max_drop: `metrics.drop` that is let pass.
    Returns {"metric", "unit", "n", "limit", "float", "int8" (None where its outputs are not finite), "found" (scores),
    "drop" (of found), "units", "evaluations" (scores of quantized models), "ignore"}. Raises UserError where no set of
    layers meets the limit.
    """
    whole, reference = quantized([]), score(model)
    tried: list[float | None] = []

    def lost(candidate: nn.Module) -> float:
        try:
            found = score(candidate)
        except NotFinite:
            tried.append(None)
            return math.inf
        tried.append(found.value)
        return drop(reference, found)

    def meets(chosen: Sequence[Unit]) -> bool:
        with _in_float(whole, chosen):
            return lost(whole) <= max_drop

    found, ignore, ranked = lost(whole), list[str](), list[Unit]()
    first = tried[0]
    if not found <= max_drop:
        expected = outputs(model, batches)
        ranked = rank(whole, batches, expected)
        layers = _fewest(ranked, meets)
        chosen = _inside(whole, batches, expected, layers, meets)
        del expected  # of a language model larger than the model
        kept = {id(q) for unit in chosen for q in unit.quantizers}
        parts = [part for unit in layers for part in unit.parts if id(part.quantizers[0]) not in kept]
        rest = [*parts, *(unit for unit in ranked if unit not in layers)]
        found, ignore = _confirmed(model, quantized, lost, chosen, rest, recorded(model, batches[0]), max_drop)
        log.info("quantize.ignore: of %d layers these stay in float: %s", len(ranked), ", ".join(ignore))
    return {
        "metric": reference.name,
        "unit": reference.unit,
        "n": reference.n,
        "limit": max_drop,
        "float": reference.value,
        "int8": first,
        "found": tried[-1],
        "drop": found,
        "units": len(ranked),
        "evaluations": len(tried),
        "ignore": ignore,
    }


@torch.no_grad()
def outputs(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> list[Outputs]:
    """What a model gives for each batch: its outputs of floating point by name, in float32."""
    return [_outputs(model, batch) for batch in batches]


@torch.no_grad()
def rank(whole: nn.Module, batches: Sequence[Mapping[str, Tensor]], expected: Sequence[Outputs]) -> list[Unit]:
    """The units of a quantized copy of a model, those first whose return to float helps its outputs most. expected: the
    model's own `outputs`."""
    return _ranked(whole, batches, expected, units(whole, batches[0]), lambda unit: [unit], 1)


@torch.no_grad()
def _ranked(
    whole: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    expected: Sequence[Outputs],
    found: Sequence[Unit],
    floats: Callable[[Unit], Sequence[Unit]],
    sign: int,
) -> list[Unit]:
    """By the error with `floats(unit)` in float; sign: 1, the smallest first, or -1, the largest."""
    errors = []
    with progress("rank layers", len(found)) as bar:
        for unit in found:
            with _in_float(whole, floats(unit)):
                errors.append(_error(whole, batches, expected))
            bar.update()
    order = sorted(range(len(found)), key=lambda i: (sign * errors[i], i))
    return [found[i] for i in order]


def _inside(
    whole: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    expected: Sequence[Outputs],
    layers: list[Unit],
    meets: Callable[[Sequence[Unit]], bool],
) -> list[Unit]:
    """The fewest operations of these layers that meet the limit, as all of them do; a layer of which all are needed is
    named as a whole."""
    parts = [part for unit in layers for part in (unit.parts if len(unit.parts) > 1 else (unit,))]
    if len(parts) == len(layers):
        return layers
    ranked = _ranked(whole, batches, expected, parts, lambda one: [part for part in parts if part is not one], -1)
    needed = _fewest(ranked, meets)
    chosen: list[Unit] = []
    for unit in layers:
        mine = [part for part in unit.parts if part in needed]
        chosen += [unit] if unit in needed or len(mine) == len(unit.parts) else mine
    return chosen


def _fewest(ranked: Sequence[Unit], meets: Callable[[Sequence[Unit]], bool]) -> list[Unit]:
    """A shortest beginning of the order that meets the limit, thinned. All together are taken to meet it."""
    low, high, asked = 0, len(ranked), 0
    while high - low > 1:
        middle, asked = (low + high) // 2, asked + 1
        low, high = (low, middle) if meets(ranked[:middle]) else (middle, high)
    chosen = list(ranked[:high])
    for unit in reversed(ranked[: high - 1]):  # without its last it did not
        if asked == 0:
            break
        asked -= 1
        fewer = [other for other in chosen if other is not unit]
        chosen = fewer if meets(fewer) else chosen
    return chosen


def _confirmed(
    model: nn.Module,
    quantized: Callable[[list[str]], nn.Module],
    lost: Callable[[nn.Module], float],
    chosen: list[Unit],
    rest: list[Unit],
    record: Record,
    max_drop: float,
) -> tuple[float, list[str]]:
    """The drop of the model quantized without these units and as many of the rest as it takes, and their patterns.
    record: of the float model."""
    names, operations = [name for name, _ in model.named_modules()], list(record.scopes.values())
    while rest:
        ignore = [pattern for unit in chosen for pattern in patterns(unit.scopes, names, operations)]
        found = lost(quantized(ignore))
        if found <= max_drop:
            return found, ignore
        more = len(chosen)
        chosen, rest = chosen + rest[:more], rest[more:]
    raise UserError(
        f"quantize.max_drop: {max_drop:g} is not met unless all layers stay in float: raise it, calibrate on more"
        " (data.calibration.samples), or train (mode: qat)"
    )


def patterns(scopes: Sequence[str], names: Sequence[str], operations: Sequence[str] = ()) -> list[str]:
    """Each module or operation as `ignore` names it: plain where that means no other, else as a regular expression."""
    found = []
    for scope in scopes:
        if is_operation(scope):
            plain = resolve_operations([scope], operations, "quantize.ignore") == {scope}
        else:
            below = {name for name in names if name == scope or name.startswith(f"{scope}.")}
            plain = resolve([scope], names, "quantize.ignore") == below
        found.append(scope if plain else f"re:^{re.escape(scope)}$")
    return found


def _in_float(whole: nn.Module, chosen: Sequence[Unit]) -> AbstractContextManager[None]:
    return computing({id(q): q for unit in chosen for q in unit.quantizers}.values(), _unchanged)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> Outputs:
    with without_cache(model):
        return {name: value.float() for name, value in by_name(model(**batch)).items() if value.is_floating_point()}


def _error(whole: nn.Module, batches: Sequence[Mapping[str, Tensor]], expected: Sequence[Outputs]) -> float:
    """Σ|a − b|² / Σ|b|² of each output, summed over outputs; infinite where it is not finite."""
    apart: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for batch, right in zip(batches, expected, strict=True):
        for name, value in _outputs(whole, batch).items():
            apart[name] = apart.get(name, 0.0) + float((value - right[name]).square().sum(dtype=torch.float64))
            sizes[name] = sizes.get(name, 0.0) + float(right[name].square().sum(dtype=torch.float64))
    total = sum(apart[name] / max(sizes[name], torch.finfo(torch.float32).tiny) for name in apart)
    return total if math.isfinite(total) else math.inf
