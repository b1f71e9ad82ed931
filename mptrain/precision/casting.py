"""Casts at the edges of the half-precision part of a model.

    model      floating inputs -> compute dtype (not labels); half outputs -> fp32, so that a loss
               outside the model is computed in fp32 (outputs that carry a loss stay as they are)
    boundary   (a module kept in fp32) inputs -> fp32; outputs -> compute dtype
    head       (of a transformers model) outputs -> fp32, so that a loss inside the model is computed in
               fp32 too; a bf16 loss has three digits

All are ordinary forward hooks, so gradient checkpointing, torch.compile and DDP see them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mptrain.precision.policy import Kept


def cast(value: Any, source: torch.dtype, target: torch.dtype) -> Any:
    """`value` with its tensors of dtype `source` cast to `target`; looks into tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.to(target) if value.dtype == source else value
    if isinstance(value, dict):
        items = {k: cast(v, source, target) for k, v in value.items()}
        # a transformers ModelOutput is a dataclass and a dict
        return type(value)(**items) if dataclasses.is_dataclass(value) else type(value)(items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cast(v, source, target) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(cast(v, source, target) for v in value)
    return value


def add_casts(model: nn.Module, kept: Kept, dtype: torch.dtype) -> list[RemovableHandle]:
    """Install the hooks; remove them through the returned handles."""
    handles = [
        model.register_forward_pre_hook(_cast_inputs(torch.float32, dtype), with_kwargs=True),
        model.register_forward_hook(_cast_outputs(dtype)),
    ]
    heads = _heads(model)
    for module in kept.boundaries:
        handles.append(module.register_forward_pre_hook(_cast_inputs(dtype, torch.float32), with_kwargs=True))
        if module not in heads:
            handles.append(module.register_forward_hook(lambda _m, _a, output: cast(output, torch.float32, dtype)))
    for module in heads:
        if module not in kept.boundaries:  # one head may feed another
            handles.append(module.register_forward_pre_hook(_cast_inputs(torch.float32, dtype), with_kwargs=True))
            handles.append(module.register_forward_hook(lambda _m, _a, output: cast(output, dtype, torch.float32)))
    return handles


def _heads(model: nn.Module) -> list[nn.Module]:
    """What a transformers model puts on its base model, but for a causal LM head, whose loss casts by itself.

    The losses of encoder-decoders (T5, BART, Whisper) do not.
    """
    children = list(model.children())
    base = getattr(model, "base_model", model)
    lm_head = getattr(model, "get_output_embeddings", lambda: None)()
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and lm_head is not None:
        return [lm_head]
    if not any(child is base for child in children):
        return []
    parametric = [c for c in children if next(c.parameters(), None) is not None]
    return [c for c in parametric if c is not base and c is not lm_head]


def _cast_inputs(source: torch.dtype, target: torch.dtype) -> Callable[..., tuple[tuple, dict]]:
    def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        kept = {k: v if k.startswith("label") else cast(v, source, target) for k, v in kwargs.items()}
        return cast(args, source, target), kept

    return hook


def _cast_outputs(dtype: torch.dtype) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: tuple, output: Any) -> Any:
        if isinstance(output, Mapping) and output.get("loss") is not None:
            return output
        return cast(output, dtype, torch.float32)

    return hook
