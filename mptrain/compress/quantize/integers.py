"""The integers that trained fake quantizers stand for, for targets that store weights without quantizers.

A fake quantizer computes y = (clip(round(w · (1/s)) + z) - z) · s; q and s are a BlockQuantized record
per tensor or row, whose dense values are y to the bit. SmoothQuant's factors stay where training
had them, on the inputs of their Linears: folding them into the weights would change the integers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from mptrain.compress.quantize import placement
from mptrain.compress.quantize.fake_quant import FakeQuantizer
from mptrain.compress.quantize.tables import GRID, RowQuantizer
from mptrain.compress.weights import grid as blockwise
from mptrain.compress.weights import records
from mptrain.compress.weights.layers import is_transposed
from mptrain.compress.weights.records import BlockQuantized
from mptrain.core.errors import ModelError
from mptrain.core.hooks import HOOKS

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def records_from_quantizers(model: nn.Module) -> dict[str, BlockQuantized]:
    """Records by weight name of a model with fake quantizers (quantizers.quantize, QAT or PTQ); it is not changed.

    Raises ModelError for a weight with a scale on another axis than that of its outputs.
    """
    found: dict[str, BlockQuantized] = {}
    for name, quantizer in placement.of_weights(module for _, module in placement.hooks(model)):
        transposed = is_transposed(model.get_submodule(name.removesuffix(".weight")))
        found[name] = _record(name, model.get_parameter(name), quantizer, transposed)
    return found


@torch.no_grad()
def weight_only(model: nn.Module, *, embeddings: Literal["fp32", "int8"] = "fp32") -> nn.Module:
    """A plain copy with those records attached: weights as trained, activations in floating point.

    embeddings: they have no quantizers; "int8" rounds each row to nearest, with its own scale, but for a table that
    is tied to a quantized weight.
    """
    plain, tables = rounded_tables(model, embeddings=embeddings)
    made = records_from_quantizers(model) | tables
    smooth = [module for _, module in placement.hooks(plain) if isinstance(module, placement.Smooth)]
    placement.unhook(plain)
    for module in smooth:
        plain.get_submodule(module.input_of).register_forward_pre_hook(_Scaled(module.scale))
    records.attach(plain, made)
    return plain


@torch.no_grad()
def activations_only(
    model: nn.Module, *, embeddings: Literal["fp32", "int8"], stands: Callable[[FakeQuantizer], nn.Module]
) -> nn.Module:
    """A copy to trace, which computes what the model does: weights are the values of their records, which are
    attached, and in the place of each fake quantizer of activations is what `stands` makes of it.
    """
    frozen, tables = rounded_tables(model, embeddings=embeddings)
    made = records_from_quantizers(model) | tables
    for names, module in placement.hooks(frozen):
        if isinstance(module, FakeQuantizer):
            placed = nn.Identity() if module.weight_of is not None else stands(module)
            for name in names:
                frozen.get_submodule(HOOKS).set_submodule(name, placed)
    records.attach(frozen, made)
    return frozen


def rounded_tables(
    model: Model, *, embeddings: Literal["fp32", "int8"] = "fp32", leave: Collection[str] = ()
) -> tuple[Model, dict[str, BlockQuantized]]:
    """What `round_tables` makes of a copy, and the records."""
    made = copy.deepcopy(model)
    return made, round_tables(made, embeddings=embeddings, leave=leave)


@torch.no_grad()
def round_tables(
    model: nn.Module, *, embeddings: Literal["fp32", "int8"] = "fp32", leave: Collection[str] = ()
) -> dict[str, BlockQuantized]:
    """Give the tables of the model the values that RowQuantizers give their rows, in place of these; the records of the
    tables by weight name, none for "fp32".

    embeddings: "int8" rounds each row of those without a RowQuantizer too, but for a table that is tied to a quantized
    weight. leave: names of embeddings whose tables stay as they are, without records.
    """
    rounded = set()
    placed = placement.hooks(model)
    quantized = {id(model.get_parameter(name)) for name, _ in placement.of_weights(module for _, module in placed)}
    for names, module in placed:
        if isinstance(module, RowQuantizer):
            rounded.add(module.table)
            for name in names:
                model.get_submodule(HOOKS).set_submodule(name, nn.Identity())
    found: dict[str, BlockQuantized] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or name in leave or id(module.weight) in quantized:
            continue
        if embeddings == "int8" or name in rounded:
            found[f"{name}.weight"] = record = blockwise.round_to_nearest(module.weight, GRID)
            module.weight.copy_(record.dense())
    return found if embeddings == "int8" else {}


class _Scaled:
    """A hook, and one that copies and traces, that multiplies the input of a Linear."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0] * self.scale, *inputs[1:])


def _record(name: str, weight: Tensor, quantizer: FakeQuantizer, transposed: bool) -> BlockQuantized:
    step, zero = quantizer.grid()
    axis = 1 if transposed else 0
    if step.numel() != 1 and (step.numel() != weight.shape[axis] or step.shape[axis] != step.numel()):
        raise ModelError(
            f"{name} has quantizer scales of shape {tuple(step.shape)}; only one, or one per row, is stored"
        )
    low, high = quantizer.levels
    q = (weight.float() * (1 / step)).round_().add_(zero).clamp_(low, high)
    dtype = torch.int8 if low < 0 else torch.uint8
    kept = zero.reshape(-1, 1).to("cpu", dtype) if low == 0 else None
    return BlockQuantized(
        records.matrix(q, transposed).to("cpu", dtype).contiguous(),
        step.reshape(-1, 1).to("cpu", torch.float32),
        kept,
        quantizer.bits,
        transposed,
    )
