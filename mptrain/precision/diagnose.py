"""Why gradients keep being non-finite: which parameters, and which layer broke first.

Parameters are read from their gradients. Activations need a forward pass to be watched, which
costs a device sync for every layer, so that is done for the last one before training is given up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SHOWN = 4


@dataclass(frozen=True)
class Activation:
    layer: str
    largest_in: float
    """largest |x| of the layer's floating inputs; inf or nan when they are not finite"""
    largest_out: float


class ActivationWatch:
    """Records the largest |activation| of every layer of the next forward passes, until removed."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[Activation] = []
        self.bad_inputs: list[str] = []
        self._handles = [model.register_forward_pre_hook(self._inputs, with_kwargs=True)]
        for name, module in model.named_modules():
            if name:
                self._handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _inputs(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        named = {**{f"argument {i}": a for i, a in enumerate(args)}, **kwargs}
        self.bad_inputs += [n for n, v in named.items() if _largest([v]) is not None and not _finite(_largest([v]))]

    def _hook(self, name: str):
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            out = _largest([output])
            if out is not None:
                self.seen.append(Activation(name, _largest([*args, *kwargs.values()]) or 0.0, out))

        return hook

    def describe(self) -> str:
        if self.bad_inputs:
            names = ", ".join(sorted(set(self.bad_inputs)))
            return f"The model's input is not finite already ({names}): the data is the cause."
        origins = [a for a in self.seen if _finite(a.largest_in) and not _finite(a.largest_out)]
        if origins:
            some = "; ".join(f"{a.layer} (largest |input| {a.largest_in:.3g})" for a in origins[:SHOWN])
            return f"In the last forward pass finite inputs became non-finite in: {some}."
        if not self.seen:
            return "No activations were seen (hooks do not fire inside a compiled model)."
        top = sorted({a.layer: a for a in self.seen}.values(), key=lambda a: -a.largest_out)[:SHOWN]
        some = ", ".join(f"{a.layer} {a.largest_out:.3g}" for a in top)
        return f"All activations of the last forward are finite (largest: {some}), so the loss or backward overflowed."


def bad_gradients(named: Iterable[tuple[str, Tensor | None]]) -> str:
    """One sentence on the parameters with non-finite gradients."""
    counts = [(name, int((~torch.isfinite(g)).sum()), g.numel()) for name, g in named if g is not None]
    bad = [c for c in counts if c[1]]
    some = ", ".join(f"{name} ({n} of {total} elements)" for name, n, total in bad[:SHOWN])
    more = ", …" if len(bad) > SHOWN else ""
    return f"Gradients are not finite in {len(bad)} of {len(counts)} parameters: {some}{more}."


def _largest(values: Sequence[Any]) -> float | None:
    """Largest |x| over all floating tensors found in `values`; nan if there is one; None without tensors."""
    found = [v.detach().abs().amax().float() for v in _tensors(values) if v.is_floating_point() and v.numel()]
    return float(torch.stack(found).amax()) if found else None  # amax propagates nan


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _finite(x: float | None) -> bool:
    return x is not None and abs(x) < float("inf")
