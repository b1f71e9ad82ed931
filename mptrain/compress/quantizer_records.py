"""The integers that trained fake quantizers stand for, for targets that store weights without quantizers.

A fake quantizer computes y = (clip(round(w · (1/s)) + z) - z) · s; q and s are a BlockQuantized record
per tensor or row, whose dense values are y to the bit. SmoothQuant's factors stay where training
had them, on the inputs of their Linears: folding them into the weights would change the integers.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mptrain.compress import placement, records
from mptrain.compress.fake_quant import FakeQuantizer
from mptrain.compress.records import BlockQuantized
from mptrain.errors import ModelError


@torch.no_grad()
def records_from_quantizers(model: nn.Module) -> dict[str, BlockQuantized]:
    """Records by weight name of a model with fake quantizers (quantizers.quantize, QAT or PTQ); it is not changed.

    Raises ModelError for a weight with a scale on another axis than its first.
    """
    found: dict[str, BlockQuantized] = {}
    for _, module in placement.hooks(model):
        if isinstance(module, FakeQuantizer) and module.weight_of is not None:
            name = f"{module.weight_of}.weight"
            found[name] = _record(name, model.get_parameter(name), module)
    return found


def weight_only(model: nn.Module) -> nn.Module:
    """A plain copy with those records attached: weights as trained, activations in floating point."""
    made = records_from_quantizers(model)
    plain = copy.deepcopy(model)
    smooth = [module for _, module in placement.hooks(plain) if isinstance(module, placement.Smooth)]
    placement.unhook(plain)
    for module in smooth:
        plain.get_submodule(module.input_of).register_forward_pre_hook(_Scaled(module.scale))
    records.attach(plain, made)
    return plain


class _Scaled:
    """A hook, and one that copies and traces, that multiplies the input of a Linear."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0] * self.scale, *inputs[1:])


def _record(name: str, weight: Tensor, quantizer: FakeQuantizer) -> BlockQuantized:
    step, zero = quantizer.grid()
    if step.numel() not in (1, weight.shape[0]) or (step.numel() > 1 and step.shape[0] != weight.shape[0]):
        raise ModelError(
            f"{name} has quantizer scales of shape {tuple(step.shape)}; only one, or one per row, is stored"
        )
    low, high = quantizer.levels
    q = (weight.float() * (1 / step)).round_().add_(zero).clamp_(low, high)
    dtype = torch.int8 if low < 0 else torch.uint8
    kept = zero.reshape(-1, 1).to("cpu", dtype) if low == 0 else None
    return BlockQuantized(
        q.flatten(1).to("cpu", dtype), step.reshape(-1, 1).to("cpu", torch.float32), kept, quantizer.bits
    )
