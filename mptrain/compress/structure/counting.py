"""Multiply-adds of a forward pass, by the parameter that is multiplied with or the attention they happen in."""

from __future__ import annotations

from collections import Counter as Numbers
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Counter(TorchDispatchMode):
    """Counts what runs inside it.

    modules: names of modules with the name to count their products of activations under.
    of: MACs by name of the parameter that one factor of a product is. inside: MACs of products of two activations,
    by the innermost of `modules` that runs.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, str]) -> None:
        super().__init__()
        self.of: Numbers[str] = Numbers()
        self.inside: Numbers[str] = Numbers()
        self._names = {p.untyped_storage()._cdata: name for name, p in model.named_parameters()}
        self._model, self._modules = model, modules
        self._running: list[str] = []

    def __enter__(self) -> Any:
        def enter(label: str) -> Any:
            return lambda *_: self._running.append(label)

        def leave(*_: Any) -> None:
            self._running.pop()

        self._handles: list[Any] = []
        for name, label in self._modules.items():
            module = self._model.get_submodule(name)
            self._handles += [module.register_forward_pre_hook(enter(label)), module.register_forward_hook(leave)]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if "scaled_dot_product" in name:
            query, key, value = args[:3]
            pairs = query.shape[:-1].numel() * key.shape[-2]
            self._count((), pairs * (query.shape[-1] + value.shape[-1]))
        elif name in ("_grouped_mm", "grouped_mm_fallback"):  # the second is transformers' on torch < 2.8
            self._count(args[:2], args[0].numel() * args[1].shape[-1])
        elif func.overloadpacket in flop_registry:
            macs = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out) // 2
            self._count(args[1:3] if name in ("addmm", "baddbmm") else args[:2], macs)
        return out

    def _count(self, factors: Sequence[Tensor], macs: int) -> None:
        names = [self._names.get(t.untyped_storage()._cdata) for t in factors]
        owner = next((name for name in reversed(names) if name is not None), None)  # a looked-up vector times a matrix
        if owner is not None:
            self.of[owner] += macs
        elif self._running:
            self.inside[self._running[-1]] += macs
