"""What a model computes, operation by operation, under NNCF's names and under ours, which `ignore` can name.

    NNCF     encoder/layer/attention/query/linear/3
    scope    encoder.layer.1.attention.query/linear/0: the module that runs it, the torch function, and which of the
             module's calls of this function it is, from 0, in one forward pass

Functions lose the underscores around them: x + y, x.add(y) and x.add_(y) are `add`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from nncf.torch.function_hook.hook_executor_mode import FunctionHookMode, OpMeta
from nncf.torch.function_hook.hook_storage import HookStorage
from nncf.torch.function_hook.wrapper import ForwardWithHooks, get_hook_storage
from torch import Tensor, nn

from mptrain.core.hooks import HOOKS

_MOVES = frozenset(
    "view reshape transpose permute contiguous flatten unflatten unsqueeze squeeze expand chunk split unbind"
    " __getitem__ getitem to type_as clone dropout cat pad".split()
)
"""functions whose outputs hold the values of their inputs"""


class Record(FunctionHookMode):
    """NNCF's bookkeeping of operation names over one forward pass, with what stands behind each.

    modules: the innermost module of the model that runs the operation. scopes: of the operations that are the
    model's and not those of a hook. inputs: its first argument before hooks; the same object for operations that read
    the same tensor.
    """

    def __init__(self, model: nn.Module, storage: HookStorage):
        super().__init__(model, storage)
        self._names = {id(m): name for name, m in model.named_modules() if not name.startswith(HOOKS)}
        self._hooks = {id(m) for name, m in model.named_modules() if name.startswith(f"{HOOKS}.")}
        self._calls: Counter[str] = Counter()
        self.modules: dict[str, str] = {}
        self.scopes: dict[str, str] = {}
        self.inputs: dict[str, Any] = {}

    def execute_pre_hooks(self, args: tuple[Any, ...], kwargs: dict[str, Any], op_meta: OpMeta) -> Any:
        inside = (self._names[id(m)] for m in reversed(self.module_call_stack) if id(m) in self._names)
        module = self.modules[op_meta.op_name] = next(inside)
        self.inputs[op_meta.op_name] = args[0] if args else None
        if not any(id(m) in self._hooks for m in self.module_call_stack):
            function = f"{module}/{op_meta.op_name.split('/')[-2].strip('_')}"
            self.scopes[op_meta.op_name] = f"{function}/{self._calls[function]}"
            self._calls[function] += 1
        return super().execute_pre_hooks(args, kwargs, op_meta)


class Readers(Record):
    """And who computes with what. readers: of each operation, and of each input of the model, the operations that read
    what it gives, behind its hooks."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor]):
        super().__init__(model, get_hook_storage(model))
        self.readers: dict[str, list[str]] = {name: [] for name in inputs}
        # with what was made, or its id would be another's
        self._made: dict[int, tuple[str, Any]] = {id(value): (name, value) for name, value in inputs.items()}

    def execute_pre_hooks(self, args: tuple[Any, ...], kwargs: dict[str, Any], op_meta: OpMeta) -> Any:
        for value in _flat((*args, *kwargs.values())):
            if id(value) in self._made:
                self.readers[self._made[id(value)][0]].append(op_meta.op_name)
        return super().execute_pre_hooks(args, kwargs, op_meta)

    def execute_post_hooks(self, output: Any, op_meta: OpMeta) -> Any:
        output = super().execute_post_hooks(output, op_meta)
        self.readers[op_meta.op_name] = []
        self._made |= {id(value): (op_meta.op_name, value) for value in _flat((output,))}
        return output

    def computing(self, operation: str) -> set[str]:
        """The operations that compute with what this one gave, as it is or moved."""
        found: set[str] = set()
        for reader in self.readers[operation]:
            found |= self.computing(reader) if reader.split("/")[-2] in _MOVES else {reader}
        return found


Recorder = TypeVar("Recorder", bound=Record)


def recorded(model: nn.Module, example: Mapping[str, Tensor]) -> Record:
    """Of a model with or without hooks."""
    return watched(Record(model, get_hook_storage(model) if HOOKS in model._modules else HookStorage()), example)


@torch.no_grad()
def watched(record: Recorder, example: Mapping[str, Tensor]) -> Recorder:
    """The record of one forward pass of its model in eval mode."""
    model: nn.Module = record.model
    plain = HOOKS not in model._modules
    training = model.training
    model.eval()
    try:
        with record:
            (model if plain else cast(ForwardWithHooks, model.forward).orig_forward)(**example)
    finally:
        model.train(training)
    return record


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value
