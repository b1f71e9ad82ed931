"""A torch model as a `Program` of ATen operations: what an exported graph computes in fp16, op by op.

The fp32 model runs under a dispatch mode that sees every operation after torch has decomposed its own.
Views and copies keep the precision of what they show. Constants are a Python number in an operation,
and tensors made without a floating operand (`full`, `arange`): an op in fp16 rounds them, as an export would,
so that finfo(float32).min becomes -inf. Fused operations (layer norm, attention, softmax) are one op each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from mptrain.core.signature import Signature, probed
from mptrain.verify.difference import of_tensors
from mptrain.verify.outputs import rows
from mptrain.verify.overflow import Op, Watch

_COPIES = {
    "_unsafe_view",
    "_reshape_copy",
    "clone",
    "detach",
    "alias",
    "lift_fresh",
    "lift_fresh_copy",
    "contiguous",
    "_to_copy",
    "copy",
}
_FIRST_ONLY = ("native_", "_native", "_scaled_dot_product", "_fused", "miopen", "cudnn", "mkldnn")
"""operations whose further results are statistics for the backward pass"""


class TorchOps:
    """`mptrain.verify.overflow.Program` of a model in fp32 and eval mode.

    batches: model inputs without labels. signature: default what running the model tells; padding is not compared.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]], signature: Signature | None = None
    ) -> None:
        self.model, self._inputs = model, batches
        self._signature = probed(model, batches[0]) if signature is None else signature
        self._weights: dict[Any, Tensor] = {}
        storages = [t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]]
        self._stored = frozenset(storages)
        found: dict[str, tuple[str, str, dict[str, None]]] = {}
        for batch in range(len(batches)):
            mode = self._call(batch, None, None)[1]
            for name, (kind, module, inputs) in mode.seen.items():
                found.setdefault(name, (kind, module, {}))[2].update(inputs)
        self._ops = [Op(name, kind, module, tuple(inputs)) for name, (kind, module, inputs) in found.items()]

    @property
    def ops(self) -> Sequence[Op]:
        return self._ops

    @property
    def batches(self) -> int:
        return len(self._inputs)

    def run(self, batch: int, keep: Collection[str], watch: Watch | None = None) -> Mapping[str, Tensor]:
        return self._call(batch, frozenset(keep), watch)[0]

    def harm(self, batch: int, ops: Collection[str]) -> Mapping[str, float]:
        mode = self._call(batch, None, None, frozenset(ops))[1]
        return mode.harm

    def _call(
        self, batch: int, keep: frozenset[str] | None, watch: Watch | None, harm: Collection[str] = ()
    ) -> tuple[dict[str, Tensor], Rounding]:
        inputs = self._inputs[batch]
        mode = Rounding(keep, watch, self._stored, self._weights, harm)
        with torch.no_grad(), scopes(self.model, mode.scope), mode:
            outputs = self._signature.call(self.model, inputs)
        return rows(outputs, inputs, self._signature), mode


@contextmanager
def scopes(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the name of the module that runs on top of `stack`."""

    def leave(*_: Any) -> None:
        stack.pop()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Rounding(TorchDispatchMode):
    """Names operations, and rounds those that are not kept. keep None: rounds nothing.

    seen: {op: (kind, module, ops it reads)} in order. stored: addresses of the storages of weights; `weights` has
    them rounded. measured: ops of which `harm` gets the error that each makes alone.
    """

    def __init__(
        self,
        keep: frozenset[str] | None,
        watch: Watch | None,
        stored: frozenset[int] = frozenset(),
        weights: dict[Any, Tensor] | None = None,
        measured: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.measured = measured
        self.harm: dict[str, float] = {}
        self.keep, self.watch, self.stored = keep, watch, stored
        self.weights: dict[Any, Tensor] = {} if weights is None else weights
        self.scope: list[str] = []
        self.seen: dict[str, tuple[str, str, dict[str, None]]] = {}
        self.maker = WeakIdKeyDictionary()  # tensor -> op; nothing for weights, inputs and constants
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        kind = func._schema.name.removeprefix("aten::")
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]
        if func.is_view or (kind in _COPIES and operands):
            result = func(*args, **kwargs)
            if operands and operands[0] in self.maker:
                for value in _floats(result):
                    self.maker[value] = self.maker[operands[0]]
            return result
        written = _written(func, args, kwargs)
        made = any(isinstance(t, Tensor) and t.dim() for t in tree_leaves((args, kwargs)))
        module = self.scope[-1] if self.scope else ""
        name = f"{module}/{kind}".removeprefix("/")
        index = self.count[name]
        half = False
        if made:
            self.count[name] += 1
            name = f"{name}.{index}" if index else name
            half = self.keep is not None and name not in self.keep
        if name in self.measured:
            copied_args, copied = self._rounded(func, args, kwargs, {id(t): t.clone() for t in written})
            alone = _floats(func(*copied_args, **copied))
        if half:
            args, kwargs = self._rounded(func, args, kwargs, {id(t): t for t in written})
        result = func(*args, **kwargs)
        if not made:
            return result
        results = _floats(result)
        if not results:
            return result
        if kind.startswith(_FIRST_ONLY):
            results = results[:1]
        inputs = dict.fromkeys(self.maker[t] for t in operands if t in self.maker)
        self.seen[name] = (kind.rstrip("_"), module, inputs)
        if name in self.measured:
            self.harm[name] = of_tensors(results[0], _half(alone[0])).error
        if half:
            if written:
                for value in written:
                    value.copy_(_half(value))
            elif isinstance(result, Tensor):
                result = _half(result)
                results = [result]
            else:
                result = tree_map_only(Tensor, lambda t: _half(t) if any(t is r for r in results) else t, result)
                results = _floats(result)[: len(results)]
        for value in [*results, *written]:
            self.maker[value] = name
            if value._base is not None and written:
                self.maker[value._base] = name
        if self.watch is not None:
            for value in results:
                self.watch(name, value)
        return result

    def _rounded(self, func: Any, args: tuple, kwargs: dict, written: Mapping[int, Tensor]) -> tuple[tuple, dict]:
        """Operands in fp16. written: by id, what stands for a tensor that the operation changes."""

        def operand(value: Tensor) -> Tensor:
            return written[id(value)] if id(value) in written else self._operand(value)

        args, kwargs = tree_map_only(Tensor, operand, (args, kwargs))
        return _round_scalars(func, args), kwargs

    def _operand(self, value: Tensor) -> Tensor:
        """Rounded, unless an op in fp16 has made it."""
        if not value.is_floating_point():
            return value
        maker = self.maker.get(value)
        if maker is not None and self.keep is not None and maker not in self.keep:
            return value
        if maker is None and value.untyped_storage().data_ptr() in self.stored:
            key = (value.data_ptr(), value.shape, value.stride())
            if key not in self.weights:
                self.weights[key] = _half(value)
            return self.weights[key]
        return _half(value)


def _half(value: Tensor) -> Tensor:
    return value.half().to(value.dtype)


def _floats(result: Any) -> list[Tensor]:
    return [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The floating tensors that the operation changes in place."""
    if not func._schema.is_mutable:
        return []
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += _floats(value)
    return found


def _round_scalars(func: Any, args: tuple) -> tuple:
    """Numbers that are operands. Attributes such as the epsilon of a layer norm have the type float, not Scalar."""
    kinds = func._schema.arguments
    return tuple(
        torch.tensor(value).half().item()
        if isinstance(value, float) and str(kinds[i].type) in ("number", "Scalar", "Tensor", "Optional[number]")
        else value
        for i, value in enumerate(args)
    )
