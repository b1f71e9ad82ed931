"""Whether a model computes step by step along a free axis, and what it gives at other lengths than the example's.

A trace is what one example went through. A loop over the tokens is in it as so many steps as the example has, and
nothing fails when the file is then run on another length: a place that is not there reads as zeros, and steps beyond
the last are left out. So where a model runs more operations on a longer example, what was converted is compared with
it on shorter and longer ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mptrain.core.signature import BATCH, Batch, Forward, Signature
from mptrain.verify.parity import furthest_of, size_of

_ROUNDING = 1e-3
"""relative, of a float32 graph whose outputs may nearly cancel (2e-4 was met in a BERT of logits near zero); more of it
where the graph differs as much on the example itself. Steps that are left out change far more."""


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def by_steps(model: nn.Module, example: Mapping[str, Tensor], signature: Signature) -> bool:
    """Whether a longer example takes more operations. model: in eval mode.

    A shorter one may take fewer for what it holds: attention without a mask, where no token of it is padding.
    """
    others = _others(example, signature)
    if not others:
        return False
    shorter, longer = others
    counts = [_operations(model, batch, signature) for batch in (shorter, dict(example), longer)]
    taken = [count for count in counts if count is not None]
    return len(taken) > 1 and taken[-1] > taken[-2]


def _operations(model: nn.Module, batch: Batch, signature: Signature) -> int | None:
    """None for a length that the model does not take."""
    with _Counted() as mode:
        try:
            signature.call(model, batch)
        except Exception:
            return None
    return mode.count


@torch.no_grad()
def wrong_length(
    graph: Forward, model: nn.Module, example: Mapping[str, Tensor], signature: Signature
) -> tuple[int, float] | None:
    """(length, relative difference) where a converted graph gives something else than the model; None where it does
    not. model: in eval mode. Judged on two rows of the example: the logits of more would take a GB."""
    example = {name: _rows(signature, name, value, 2) for name, value in example.items()}
    base = _difference(graph, model, dict(example), signature) or 0.0
    for batch in _others(example, signature):
        found = _difference(graph, model, batch, signature)
        if found is not None and not found <= max(_ROUNDING, 10 * base):
            sizes = (value.shape[place] for name, value in batch.items() for place in _places(signature, name))
            return next(sizes), found
    return None


def _difference(graph: Forward, model: nn.Module, batch: Batch, signature: Signature) -> float | None:
    """Largest, relative to the largest value; infinite where the graph does not run or gives other shapes. None where
    the model itself does not."""
    try:
        wanted = signature.run(model, batch)
    except Exception:
        return None
    try:
        found = graph(batch)
    except Exception:
        return float("inf")
    worst = 0.0
    for name, value in wanted.items():
        got = torch.as_tensor(np.asarray(found[name]))
        if got.shape != value.shape or not got.isfinite().all():
            return float("inf")
        worst = max(worst, furthest_of(got, value)[0] / max(size_of(value), 1e-6))
    return worst


def _rows(signature: Signature, name: str, value: torch.Tensor, count: int) -> torch.Tensor:
    """The first ones, where their number is free."""
    place = next((place for place, word in signature.input(name).free.items() if word == BATCH), None)
    return value if place is None else value.narrow(place, 0, min(count, value.shape[place]))


def _places(signature: Signature, name: str) -> list[int]:
    return [place for place, word in signature.input(name).free.items() if word != BATCH]


def _others(example: Mapping[str, Tensor], signature: Signature) -> list[Batch]:
    """The example at half of its length, from its start on, and at twice of it, there and back: a state that soon
    forgets would end as that of the first half, were the tokens repeated. None of them where no length is free."""
    if not signature.lengths():
        return []
    found = []
    for longer in (False, True):
        batch = {}
        for name, value in example.items():
            for place in _places(signature, name):
                half = max(1, value.shape[place] // 2)
                value = torch.cat([value, value.flip(place)], place) if longer else value.narrow(place, 0, half)
            batch[name] = value
        found.append(batch)
    return found
