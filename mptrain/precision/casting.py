"""Casts at the edges of the half-precision part of a model.

    model      half outputs -> fp32, so that a loss outside the model is computed in fp32 (outputs that carry
               a loss stay as they are); inputs are left alone, they may be targets, times or prices
    layer      (of torch.nn, with half weights, and not one of many in a ModuleList) fp32 inputs -> compute dtype
    boundary   (a module kept in fp32) inputs -> fp32; outputs -> compute dtype
    head       (of a transformers model) inputs -> compute dtype, outputs -> fp32, so that a loss inside the model is
               computed in fp32 too; a bf16 loss has three digits

Whatever else of fp32 meets half, `meeting.py` finds. All are ordinary forward hooks, so gradient checkpointing,
torch.compile and DDP see them; a copy of the model leaves them behind.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mptrain.core.embeddings import output_embedding
from mptrain.core.link import Link
from mptrain.precision.meeting import Meeting, own_half
from mptrain.precision.policy import Kept


def cast(value: Any, source: torch.dtype, target: torch.dtype) -> Any:
    """`value` with its tensors of dtype `source` cast to `target`; looks into tuples, lists, mappings and dataclasses.

    A container keeps its kind (a defaultdict its factory, a ModelOutput its fields); one without such tensors is
    returned as it is.
    """
    if isinstance(value, Tensor):
        return value.to(target) if value.dtype == source else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cast(v, source, target) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(cast(v, source, target) for v in value)
    if isinstance(value, Mapping):
        changed = {k: new for k, v in value.items() if (new := cast(v, source, target)) is not v}
        return _with_items(value, changed) if changed else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        changed = {k: new for k, v in fields.items() if (new := cast(v, source, target)) is not v}
        if changed:
            value = copy.copy(value)
            for name, new in changed.items():
                object.__setattr__(value, name, new)  # a frozen one, too
    return value


def _with_items(value: Mapping, changed: Mapping) -> Mapping:
    if not isinstance(value, MutableMapping):
        return type(value)({**value, **changed})  # type: ignore[call-arg]
    if dataclasses.is_dataclass(value):  # a ModelOutput, which cannot be copied with fields that are None
        return type(value)(**{**value, **changed})
    twin = copy.copy(value)
    for name, new in changed.items():
        twin[name] = new  # a ModelOutput of no class of its own refuses `update`
    return twin


class Casts:
    """The hooks of one model; `install` and `remove` may follow each other, what was learnt stays.

    half: as `own_half`, for a model whose weights are half inside of forward only.
    """

    def __init__(
        self, model: nn.Module, kept: Kept, dtype: torch.dtype, half: Callable[[nn.Module], bool] = own_half
    ) -> None:
        self.model, self.kept, self.dtype = model, kept, dtype
        self._heads = list(_heads(model))
        outer = [m for m in _outer_layers(model, half) if m not in self._heads and m not in kept.boundaries]
        self._meeting = Meeting(model, dtype, outer, half)
        self._handles: list[RemovableHandle] = []

    def install(self) -> Casts:
        down = _cast_inputs(torch.float32, self.dtype)
        up = _cast_inputs(self.dtype, torch.float32)
        self._meeting.install()
        for module in self.kept.boundaries:
            self._before(module, up)
            if module not in self._heads:
                self._after(module, lambda output: cast(output, torch.float32, self.dtype))
        for module in self._heads:
            if module not in self.kept.boundaries:  # one head may feed another
                self._before(module, down)
                self._after(module, lambda output: cast(output, self.dtype, torch.float32))
        self._after(self.model, self._outputs)
        return self

    def remove(self) -> None:
        self._meeting.remove()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, module: nn.Module, change: Callable[[tuple, dict], tuple[tuple, dict]]) -> None:
        hook = Link(lambda _m, args, kwargs: change(args, kwargs))
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module: nn.Module, change: Callable[[Any], Any]) -> None:
        self._handles.append(module.register_forward_hook(Link(lambda _m, _args, output: change(output))))

    def _outputs(self, output: Any) -> Any:
        if isinstance(output, Mapping) and output.get("loss") is not None:
            return output
        return cast(output, self.dtype, torch.float32)


def _outer_layers(module: nn.Module, half: Callable[[nn.Module], bool], repeated: bool = False) -> Iterator[nn.Module]:
    """Layers of torch.nn with half weights, where data comes in; those of repeated blocks see activations.

    All recurrent ones, for they compare dtypes before any operation does.
    """
    for child in module.children():
        inside = repeated or isinstance(child, (nn.ModuleList, nn.ModuleDict))
        if half(child) and (not inside or isinstance(child, (nn.RNNBase, nn.RNNCellBase))):
            yield child
        yield from _outer_layers(child, half, inside)


def _heads(model: nn.Module) -> Iterator[nn.Module]:
    """What transformers models put on their base models, but for a causal LM head, whose loss casts by itself.

    The losses of encoder-decoders (T5, BART, Whisper) do not. Models inside others (PEFT) count.
    """
    for module in model.modules():
        children = list(module.children())
        base = getattr(module, "base_model", module)
        lm_head = output_embedding(module)
        own_head = [c for c in children if c is lm_head]
        if own_head and getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            yield from own_head
        elif any(child is base for child in children):
            parametric = [c for c in children if next(c.parameters(), None) is not None]
            yield from (c for c in parametric if c is not base and c is not lm_head)


def _cast_inputs(source: torch.dtype, target: torch.dtype) -> Callable[[tuple, dict], tuple[tuple, dict]]:
    def change(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        kept = {k: v if k.startswith("label") else cast(v, source, target) for k, v in kwargs.items()}
        return cast(args, source, target), kept

    return change
