"""How near to a model with fake quantizers another execution of the same model can come.

An activation that lies within rounding of the middle between two levels is rounded to the other one by another order of
summation; behind it further values cross, and after some layers all of them have been rounded anew. Two executions in
torch that differ in nothing else:

    in_float64    everything in float64: what is left is the rounding of float32 in the model itself, about 1e-7
    shifted       the quantizers as OpenVINO's kernel computes them, round(x · 255/(high − low) + 128) − 128 in float32:
                  beside 128 a float32 has steps of 1.5e-5 levels

`levels` counts whose level differs, quantizer by quantizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.compress.quantize import placement
from mptrain.compress.quantize.fake_quant import FakeQuantizer


def in_float64(model: nn.Module) -> nn.Module:
    """A copy in float64 with the scales, tables and weights of the model."""
    made = copy.deepcopy(model).eval()
    grids = [(quantizer, quantizer.grid()) for quantizer in _quantizers(made)]  # before the ranges are float64
    made.double()
    for quantizer, grid in grids:
        step, zero = (t.detach().double() for t in grid)
        low, high = quantizer.levels
        quantizer.forward = partial(_exact, step=step, zero=zero, low=low, high=high)  # type: ignore[method-assign]
    return made


def shifted(model: nn.Module) -> nn.Module:
    """A copy whose quantizers of activations are computed as OpenVINO computes them. They are symmetric."""
    made = copy.deepcopy(model).eval()
    for quantizer in _quantizers(made):
        if quantizer.weight_of is None:
            step, _ = (t.detach() for t in quantizer.grid())
            low, high = quantizer.levels
            scale = (high - low) / (high * step - low * step)
            quantizer.forward = partial(_moved, step=step, scale=scale, low=low, high=high)  # type: ignore[method-assign]
    return made


def _exact(x: Tensor, *, step: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    return ((x / step).round().add(zero).clamp(low, high) - zero) * step


def _moved(x: Tensor, *, step: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    at = (x.double() * scale.double() - low).float()  # a fused multiply-add rounds once
    return (at.round().clamp(0, high - low) + low) * step


def _quantizers(model: nn.Module) -> Iterator[FakeQuantizer]:
    return (module for _, module in placement.hooks(model) if isinstance(module, FakeQuantizer))


@torch.no_grad()
def levels(model: nn.Module, other: nn.Module, batch: Mapping[str, Tensor], mask: Tensor) -> list[dict[str, Any]]:
    """Of each quantizer of activations, in the order they run: the share of its values whose level is another in the
    other model. other: a copy of the model. mask: of the batch, what is no padding, [b, s]."""
    one, two = (_rounded(m, batch, mask) for m in (model, other))
    return [
        {"quantizer": name, "differ": float((value.sub(two[name]).abs() > 0.5).double().mean())}
        for name, value in one.items()
    ]


def _rounded(model: nn.Module, batch: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    handles = []
    for (name, *_), module in placement.hooks(model):
        if isinstance(module, FakeQuantizer) and module.weight_of is None:
            handles.append(module.register_forward_hook(_keeper(found, name, module, mask)))
    model(**batch)
    for handle in handles:
        handle.remove()
    return found


def _keeper(found: dict[str, Tensor], name: str, quantizer: FakeQuantizer, mask: Tensor) -> Callable[..., None]:
    step, _ = quantizer.grid()

    def keep(module: nn.Module, args: Any, value: Tensor) -> None:
        counted = value[mask] if value.shape[:2] == mask.shape else value  # by heads, [b, h, s, d], or one to a text
        found.setdefault(name, counted.double() / step.double())

    return keep
