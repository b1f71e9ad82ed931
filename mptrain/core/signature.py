"""What goes into a model and comes out of it: names, types, and which sizes are free.

    Port(name, axes, dtype)     one tensor. An axis is a word, "batch" or "tokens", whose size is free and the same
                                wherever the word stands, or a number, which is fixed
    Signature(inputs, outputs)  of a model; an output with the axes of a mask is per token
    Signature(…, call)          of a model and what is computed after it: call(model, inputs) gives the outputs

Made once, by the task (or by `probed`), and asked by everyone who would else guess from shapes: converters for the
axes that stay dynamic, parity and searches for what is padding, runtimes of fixed shapes for what to cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mptrain.core.errors import ModelError

BATCH = "batch"
TOKENS = ("input_ids", "decoder_input_ids")
"""inputs that are ids of tokens"""
MASK = "attention_mask"
"""how the name of an input ends that says, with 1 and 0, which places of its axes count"""

Batch = dict[str, Tensor]
Outputs = Mapping[str, Any]
"""tensors or arrays by name, as a model or a runtime gives them"""
Forward = Callable[[Mapping[str, Tensor]], Mapping[str, np.ndarray]]
"""an exported model: inputs by name to arrays by name"""


Call = Callable[[nn.Module, Mapping[str, Any]], Any]
"""(model, inputs by name) to what its forward returns, or more than that"""


def called(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    return model(**inputs)


@dataclass(frozen=True)
class Port:
    """dtype: as torch writes it, "int64" or "float32"."""

    name: str
    axes: tuple[str | int, ...]
    dtype: str = "float32"

    @property
    def free(self) -> dict[int, str]:
        """The axes whose size is open, with their words."""
        return {place: axis for place, axis in enumerate(self.axes) if isinstance(axis, str)}


@dataclass(frozen=True)
class Signature:
    """inputs: in the order of a forward by position. outputs: those that count; a model may give more. call: what
    gives them, of a model and inputs by name."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    call: Call = called

    @property
    def input_names(self) -> list[str]:
        return [port.name for port in self.inputs]

    @property
    def output_names(self) -> list[str]:
        return [port.name for port in self.outputs]

    def input(self, name: str) -> Port:
        return next(port for port in self.inputs if port.name == name)

    def output(self, name: str) -> Port:
        return next(port for port in self.outputs if port.name == name)

    def lengths(self) -> list[str]:
        """Words of the free axes beside the batch, in order."""
        words = (word for port in self.inputs for word in port.free.values())
        return list(dict.fromkeys(word for word in words if word != BATCH))

    def mask(self, output: str) -> str | None:
        """The input that says which places [batch, length] of an output count; None where all do."""
        axes = self.output(output).axes
        for port in self.inputs:
            if port.name.endswith(MASK) and len(port.axes) == 2 and port.axes == axes[:2]:
                return port.name
        return None

    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The outputs that count, by name."""
        return self.named(self.call(model, inputs))

    def named(self, outputs: Any) -> dict[str, Tensor]:
        """The outputs that count, by name, of what a forward returned: a mapping, a tuple or a tensor."""
        found = by_name(outputs)
        missing = [name for name in self.output_names if name not in found]
        if missing:
            raise ModelError(f"the model has the outputs {list(found)}, and lacks {missing} of its signature")
        return {name: found[name] for name in self.output_names}


def rows_of(batch: Mapping[str, Any]) -> int:
    """Examples of a batch."""
    return len(next(iter(batch.values())))


def counted_places(batch: Mapping[str, Any], mask: str, shape: Sequence[int]) -> Tensor:
    """Bool [batch, length], the places that count of a tensor of that shape; all where the batch has no such mask."""
    found = batch.get(mask)
    return torch.ones(tuple(shape[:2]), dtype=torch.bool) if found is None else torch.as_tensor(found).bool()


def by_name(outputs: Any) -> dict[str, Tensor]:
    """All tensors that a forward returned; those without a name are called output, or output_0, output_1, …"""
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    if isinstance(outputs, tuple | list):
        outputs = {f"output_{index}": value for index, value in enumerate(outputs)}
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


@torch.no_grad()
def probed(model: nn.Module, example: Mapping[str, Tensor]) -> Signature:
    """The signature of a model that no task describes, found by running it on the example at other sizes.

    example: inputs by name. Free are the batch, and the length of integers [batch, tokens] and of waveforms [batch,
    samples]; other inputs keep their sizes, and so does an axis of which the model takes no other. An output's axis
    that follows the length is per token; one that follows it in another way has a word of its own.
    """
    inputs = [Port(n, _input_axes(n, v, example), _dtype(v)) for n, v in example.items()]
    training = model.training
    model.eval()
    try:
        shapes = _outputs(model, example)
        axes: dict[str, list[str | int]] = {name: list(value.shape) for name, value in shapes.items()}
        for word in dict.fromkeys(word for port in inputs for word in port.free.values()):
            here, there = _sizes(inputs, example, word)
            try:
                found = _outputs(model, _resized(inputs, example, word, there))
            except Exception:
                inputs = [_fixed(port, example[port.name], word) for port in inputs]
                continue
            for name, value in shapes.items():
                for place, (before, after) in enumerate(zip(value.shape, found[name].shape)):
                    if before != after:
                        follows = (before, after) == (here, there) and axes[name][place] == before
                        axes[name][place] = word if follows else f"{name}_{place}"
    finally:
        model.train(training)
    outputs = (Port(name, tuple(axes[name]), _dtype(value)) for name, value in shapes.items())
    return Signature(tuple(inputs), tuple(outputs))


def _input_axes(name: str, value: Tensor, example: Mapping[str, Tensor]) -> tuple[str | int, ...]:
    """A length is open where the input is integers [batch, length], a waveform, or has a mask."""
    shape = tuple(value.shape)
    alike = {n: v for n, v in example.items() if v.dim() >= 2 and tuple(v.shape[:2]) == shape[:2]}
    sounds = [v for n, v in alike.items() if v.is_floating_point() and (n == "input_values" or _masked(alike))]
    floating = value.is_floating_point()
    if value.dim() < 2 or (floating and not sounds) or (not floating and value.dim() > 2):
        return (BATCH, *shape[1:])
    if sounds:
        word = "samples" if sounds[0].dim() == 2 else "frames"
    else:
        word = "decoder_tokens" if name.startswith("decoder_") else "tokens"
    return (BATCH, word, *shape[2:])


def _masked(names: Iterable[str]) -> bool:
    return any(name.endswith(MASK) for name in names)


def _sizes(inputs: Sequence[Port], example: Mapping[str, Tensor], word: str) -> tuple[int, int]:
    """Of a free axis in the example, and another to try: half for a sound, whose frames are hundreds of samples."""
    here = next(example[port.name].shape[place] for port in inputs for place, axis in port.free.items() if axis == word)
    return here, 2 if here == 1 else here // 2 if word == "samples" else here - 1


def _resized(inputs: Sequence[Port], example: Mapping[str, Tensor], word: str, size: int) -> dict[str, Tensor]:
    """The last values are kept: some classifiers read a text at its end token, and refuse one without."""
    found = dict(example)
    for port in inputs:
        for place in (place for place, axis in port.free.items() if axis == word):
            value = found[port.name]
            value = value.repeat_interleave(2, place) if value.shape[place] < size else value
            found[port.name] = value.narrow(place, value.shape[place] - size, size)
    return found


def _fixed(port: Port, value: Tensor, word: str) -> Port:
    axes = (value.shape[place] if axis == word else axis for place, axis in enumerate(port.axes))
    return replace(port, axes=tuple(axes))


def _outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with without_cache(model):
        return by_name(model(**inputs))


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """A causal LM that returns logits alone."""
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    if use_cache is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if use_cache is not None:
            config.use_cache = use_cache


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
