"""One forward pass, written down: every operation, in which module it ran, and which integers modules were asked for.

`Recorder` is a dispatch mode: operations arrive decomposed (linear as t and addmm, einsum as bmm), with real values, so
tables of indices and what depends on data just are what they are. `Reads` replaces the classes of modules for the time
by subclasses that note which integer attributes the code reads: what may count units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mptrain.compress.structure.attributes import CONFIG, OwnConfig
from mptrain.compress.structure.dataflow.labels import storage

_NO_FLOW = frozenset(
    "_local_scalar_dense is_nonzero equal zeros_like ones_like empty_like full_like new_zeros new_ones new_empty"
    " new_full rand_like randn_like nonzero _assert_async histc isin bernoulli is_same_size allclose".split()
)
"""what they give depends on shapes, or steers the program: no number of theirs belongs to a unit"""


@dataclass(frozen=True)
class Operation:
    """name: of the ATen operation without its overload. module: the innermost that ran."""

    name: str
    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    module: str

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)


class Recorder(TorchDispatchMode):
    """Keeps the operations of the forward passes that run inside it, and all their tensors alive."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._names = {module: name for name, module in model.named_modules()}
        self._running = [""]
        self._alive: list[Tensor] = []

    def __enter__(self) -> Any:
        def enter(module: nn.Module, _: Any) -> None:
            self._running.append(self._names.get(module, self._running[-1]))

        def leave(*_: Any) -> None:
            self._running.pop()

        self._handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs, outputs = tensors((args, kwargs)), tensors(out)
        self._alive += outputs  # so that no later storage takes the place of an earlier one
        name = func.overloadpacket.__name__
        known = {storage(t) for t in inputs}
        view = not func._schema.is_mutable and all(storage(t) in known for t in outputs)
        if inputs and outputs and not view and name not in _NO_FLOW:
            self.operations.append(Operation(name, func, args, kwargs, inputs, outputs, self._running[-1]))
        return out

    def live(self, results: Sequence[Tensor]) -> list[Operation]:
        """The operations that some result needs: a mean over heads that nobody reads joins no heads."""
        needed, found = {storage(t) for t in results}, []
        for operation in reversed(self.operations):
            if any(storage(t) in needed for t in operation.outputs):
                needed.update(storage(t) for t in operation.inputs)
                found.append(operation)
        return found[::-1]


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a nest of lists, tuples and dicts; of ModelOutput too, which is a dict."""
    if isinstance(value, Mapping):
        return [t for one in value.values() for t in tensors(one)]
    if isinstance(value, list | tuple):
        return [t for one in value for t in tensors(one)]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class Reads:
    """Notes, while it is entered, the integer attributes that modules of `model` are asked for.

    found: (module, attribute), also of lists and tuples of integers; an attribute of a module's config is
    "config.NAME".
    """

    def __init__(self, model: nn.Module) -> None:
        self.found: set[tuple[str, str]] = set()
        self._names = {module: name for name, module in model.named_modules()}
        self._classes: dict[type, type] = {}

    def __enter__(self) -> Reads:
        self._were = [(module, type(module)) for module in self._names]
        for module, cls in self._were:
            if cls not in self._classes:
                self._classes[cls] = self._noting(cls)
            try:
                module.__class__ = self._classes[cls]
            except TypeError:  # its layout is not that of a Python class: nothing of it is noted
                continue
        return self

    def __exit__(self, *_: Any) -> None:
        for module, cls in self._were:
            module.__class__ = cls

    def _noting(self, cls: type) -> type:
        names, found = self._names, self.found

        def __getattribute__(module: Any, attribute: str) -> Any:
            value = object.__getattribute__(module, attribute)
            if attribute.startswith("_") or attribute == "training":
                return value
            if counts(value):
                found.add((names[module], attribute))
            elif attribute == "config" and attribute in object.__getattribute__(module, "__dict__"):
                return _NotingConfig(value, names[module], found) if names[module] else value
            return value

        own = {"__getattribute__": __getattribute__, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        return type(cls.__name__, (cls,), own)


class _NotingConfig(OwnConfig):
    def __init__(self, shared: Any, module: str, found: set[tuple[str, str]]) -> None:
        super().__init__(shared)
        self.__dict__["_note"] = (module, found)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if "_note" in self.__dict__ and type(value) is int:
            module, found = self.__dict__["_note"]
            found.add((module, CONFIG + name))
        return value


def counts(value: Any) -> bool:
    """Whether it is a whole number, or a list or tuple of them."""
    if isinstance(value, list | tuple):
        return bool(value) and all(type(item) is int for item in value)
    return type(value) is int


def run(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """All floating-point outputs; what is drawn at random is drawn alike each time."""
    torch.default_generator.manual_seed(0)  # of the CPU alone: those of devices stay where they are
    with torch.no_grad():
        return [t for t in tensors(model(**inputs)) if t.is_floating_point()]
