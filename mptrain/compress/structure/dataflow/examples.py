"""Inputs to look for blocks with: one row of the example, or made up from the model's config; and others to prove on.

Values do not matter, shapes do: text is made short, pictures and sounds as large as the model needs them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.core.errors import ModelError

Inputs = dict[str, Any]
ROWS, TOKENS, SIDE, SAMPLES = 1, 8, 224, 4_000


def given(example: Mapping[str, Any]) -> list[Inputs]:
    """One row of it, on the CPU, in float32 where it is not integers: with few tokens, then as it is."""
    whole = _first_row(example)
    lengths = {value.shape[1] for value in whole.values() if _is_text(value)}
    if not any(length > 2 * TOKENS for length in lengths):
        return [whole]
    short = {
        name: value[:, : 2 * TOKENS] if _is_text(value) and value.shape[1] in lengths else value
        for name, value in whole.items()
    }
    hidden = any(_is_text(value) and not value.any() and whole[name].any() for name, value in short.items())
    return [whole] if hidden else [short, whole]  # a mask of padding on the left would leave nothing to see


def _is_text(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 2 and not value.is_floating_point()


def _first_row(example: Mapping[str, Any]) -> Inputs:
    sizes = [value.shape[0] for value in example.values() if isinstance(value, Tensor) and value.dim()]
    rows = max(set(sizes), key=sizes.count) if sizes else 0
    found: Inputs = {}
    for name, value in example.items():
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = value.float() if value.is_floating_point() else value
            value = value[:ROWS] if value.dim() and value.shape[0] == rows else value
        found[name] = value
    return found


def made_up(model: nn.Module) -> Inputs:
    """Inputs of a transformers model by the names that its forward takes. Raises ModelError for what is not known."""
    config, accepted = getattr(model, "config", None), _accepted(model)
    generator = torch.Generator().manual_seed(0)
    found: Inputs = {}
    if config is not None:
        for name in ("input_ids", "decoder_input_ids", "inputs"):
            if name in accepted and not (name == "inputs" and found):
                length = TOKENS - 2 if name.startswith("decoder") else TOKENS
                found[name] = _ids(config, length, generator)
        for name, make in _MEDIA.items():
            if name in accepted and (name not in found) and getattr(model, "main_input_name", name) == name:
                found.pop("input_ids", None) if name == getattr(model, "main_input_name", None) else None
                found[name] = make(config, generator)
        if "pixel_values" in accepted and "input_ids" in found:
            found["pixel_values"] = _picture(config, generator)
    if not found:
        raise ModelError(
            f"{type(model).__name__}: what its inputs are is not known, so its blocks cannot be found without an"
            " example; give find_structure one: the keyword arguments of a forward pass"
        )
    return found


def _accepted(model: nn.Module) -> set[str]:
    """The arguments of forward; where it passes on any, of the class whose forward names an input."""
    known = {"input_ids", "inputs", *_MEDIA}
    names = (set(inspect.signature(cls.forward).parameters) for cls in type(model).__mro__ if hasattr(cls, "forward"))
    return next((found for found in names if found & known), set())


def others(inputs: Inputs) -> list[Inputs]:
    """The same inputs with a row more and, where they are integers, a token less; the first that a model may take."""
    longer = {name: _extended(value) for name, value in inputs.items()}
    lengths = {value.shape[1] for value in inputs.values() if _is_text(value) and value.shape[1] > 2}
    shorter = {name: _shortened(value, lengths) for name, value in longer.items()}
    return [shorter, longer, inputs] if lengths else [longer, inputs]


def _extended(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.dim():
        return value
    rolled = value.roll(1, -1) if value.dim() > 1 else value
    return torch.cat([rolled, value[:1]])


def _shortened(value: Any, lengths: set[int]) -> Any:
    return value[:, : value.shape[1] - 1] if _is_text(value) and value.shape[1] in lengths else value


def _ids(config: Any, length: int, generator: torch.Generator) -> Tensor:
    text = config.get_text_config()
    size = getattr(text, "vocab_size", None) or 2
    return torch.randint(min(5, size - 1), size, (ROWS, length), generator=generator)


def _picture(config: Any, generator: torch.Generator) -> Tensor:
    config = getattr(config, "vision_config", config)
    side = getattr(config, "image_size", None) or SIDE
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return torch.randn(ROWS, getattr(config, "num_channels", 3), height, width, generator=generator)


def _sound(config: Any, generator: torch.Generator) -> Tensor:
    """Samples, or a spectrogram [batch, frames, bins]."""
    if not hasattr(config, "num_mel_bins"):
        return torch.randn(ROWS, SAMPLES, generator=generator)
    return torch.randn(ROWS, getattr(config, "max_length", None) or 100, config.num_mel_bins, generator=generator)


def _features(config: Any, generator: torch.Generator) -> Tensor:
    """A spectrogram [batch, bins, frames]."""
    frames = 2 * getattr(config, "max_source_positions", 50)
    return torch.randn(ROWS, getattr(config, "num_mel_bins", 80), frames, generator=generator)


_MEDIA = {"pixel_values": _picture, "input_values": _sound, "input_features": _features}
