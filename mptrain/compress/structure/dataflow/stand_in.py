"""A model on which blocks are looked for and proved: the same modules, with random values on the CPU for the time.

    every parameter   float32 and random, with a storage of its own; the model's own tensors are put back unchanged
    every buffer      its values (tables of indices, frequencies), random where it is filled with one number; of a
                      model without weights those that its config makes
    state             eval mode, no cache, no quantizers, no masters, no fused kernels that hide what they do; random
                      generators untouched

So a proof does not depend on what was trained (a layer that starts at zero would hide everything behind it), and
nothing is ever written into the model's own tensors. It takes as much memory as the model in float32, once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from mptrain.core.errors import ModelError
from mptrain.core.hooks import HOOKS, without_hooks
from mptrain.core.link import asleep

_POOL = 1 << 20  # random numbers that parameters repeat; a prime shorter, so that no two rows are alike
_ON_CPU = ("eager", "sdpa")


class Slots:
    """Where each tensor of a model hangs: all modules and names, of shared ones several."""

    def __init__(self, model: nn.Module) -> None:
        self._slots: dict[str, list[tuple[dict[str, Any], str]]] = {}
        self.parameters: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        names: dict[int, str] = {}
        for prefix, module in model.named_modules():
            if prefix.partition(".")[0] == HOOKS:
                continue
            for found, store in ((self.parameters, module._parameters), (self.buffers, module._buffers)):
                for last, tensor in store.items():
                    if tensor is not None:
                        name = names.setdefault(id(tensor), f"{prefix}.{last}" if prefix else last)
                        found.setdefault(name, tensor)
                        self._slots.setdefault(name, []).append((store, last))

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.parameters | self.buffers

    def now(self, name: str) -> Tensor:
        store, last = self._slots[name][0]
        return store[last]

    def owners(self, name: str) -> int:
        return len(self._slots[name])

    @contextmanager
    def swapped(self, new: Mapping[str, Tensor]) -> Iterator[None]:
        """With other tensors in the place of some."""
        before = {name: self.now(name) for name in new}
        self._set({n: nn.Parameter(t, requires_grad=False) if n in self.parameters else t for n, t in new.items()})
        try:
            yield
        finally:
            self._set(before)

    def _set(self, new: Mapping[str, Any]) -> None:
        for name, tensor in new.items():
            for store, last in self._slots[name]:
                store[last] = tensor


@contextmanager
def stand_in(model: nn.Module, seed: int = 0) -> Iterator[Slots]:
    """Within it, `model` is as the module says. Raises ModelError for a model whose buffers cannot be had, or for which
    there is not the memory."""
    slots = Slots(model)
    _check_memory(model, slots)
    buffers = _buffers(model, slots)
    pool = torch.randn(_POOL - 3, generator=torch.Generator().manual_seed(seed))
    new = {name: buffer.detach().to("cpu", copy=True).contiguous() for name, buffer in buffers.items()}
    new = {n: t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for n, t in new.items()}
    new |= {name: buffer + 0.3 * _random(buffer.shape, pool, 0).abs() for name, buffer in new.items() if _flat(buffer)}
    start = 0
    for name, parameter in slots.parameters.items():
        if not parameter.is_floating_point():
            new[name] = parameter.detach().to("cpu", copy=True)
            continue
        new[name] = _random(parameter.shape, pool, start)
        start = (start + parameter.numel()) % len(pool)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(_plain(model))
        stack.enter_context(without_hooks(model))
        stack.enter_context(asleep())
        stack.enter_context(slots.swapped(new))
        yield slots


def _check_memory(model: nn.Module, slots: Slots) -> None:
    needed, free = 4 * sum(p.numel() for p in slots.parameters.values()), psutil.virtual_memory().available
    if needed > 0.8 * free:
        raise ModelError(
            f"finding what can be cut out of {type(model).__name__} runs it in float32, which takes"
            f" {needed / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are free. Use a host with more."
        )


def _random(shape: torch.Size, pool: Tensor, start: int) -> Tensor:
    """Matrices that keep the size of what they multiply, vectors around a half: scales and biases alike."""
    numel, values = shape.numel(), torch.empty(shape)
    flat, filled = values.view(-1), 0
    while filled < numel:
        part = pool[start : start + numel - filled]
        flat[filled : filled + len(part)] = part
        filled, start = filled + len(part), 0
    if len(shape) < 2:
        return values.mul_(0.3).add_(0.5)
    fan = (shape[0] + shape[1:].numel()) / 2
    return values.mul_(1.2 / fan**0.5)


def _flat(buffer: Tensor) -> bool:
    """Filled with one number, as the sums of a batch norm at first: any two of its entries could be mistaken."""
    several = buffer.is_floating_point() and buffer.numel() > 1 and bool(buffer.isfinite().all())
    return several and bool((buffer == buffer.flatten()[0]).all())


def _buffers(model: nn.Module, slots: Slots) -> Mapping[str, Tensor]:
    if not any(buffer.is_meta for buffer in slots.buffers.values()):
        return slots.buffers
    config = getattr(model, "config", None)
    if config is None:
        raise ModelError(
            f"{type(model).__name__} has buffers without values, so what it computes cannot be known; load its weights"
        )
    with torch.device("cpu"), no_init_weights():
        made = type(model)(copy.deepcopy(config))
    found = dict(made.named_buffers())
    missing = [name for name, buffer in slots.buffers.items() if buffer.is_meta and name not in found]
    if missing:
        raise ModelError(f"{type(model).__name__}: the buffer {missing[0]} has no values; load the model's weights")
    return {name: found[name] if buffer.is_meta else buffer for name, buffer in slots.buffers.items()}


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Eval mode, no cache, kernels that run on a CPU and are seen operation by operation."""
    training = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    before: list[tuple[Any, str, Any]] = []
    for config in _configs(model):
        if getattr(config, "use_cache", False):
            before.append((config, "use_cache", config.use_cache))
            config.use_cache = False
        if getattr(config, "_attn_implementation", None) not in (None, *_ON_CPU):
            before.append((config, "_attn_implementation", config._attn_implementation))
            config._attn_implementation = "eager"
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for config, name, value in before:
            setattr(config, name, value)
        for module, was in training.items():
            module.training = was


def _configs(model: nn.Module) -> list[Any]:
    """The configs of a model and those within them, each once."""
    found: dict[int, Any] = {}
    held: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    todo = [config for config in held if isinstance(config, PreTrainedConfig)]
    while todo:
        config = todo.pop()
        if id(config) not in found:
            found[id(config)] = config
            todo += [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return list(found.values())
