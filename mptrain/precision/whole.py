"""Whatever leaves a model with masters is whole, and fp32.

    model.state_dict()                 the masters, each with a storage of its own, of any submodule too
    copy.deepcopy(model), pickle       fp32 parameters and no hooks; also of a submodule or a single parameter
    model.save_pretrained()            the masters, and a config that says float32
    model.load_state_dict()            goes to the masters, of any submodule too

Half are the parameters themselves (`model.parameters()`, `p.data`), because they are what computes.
Modules and parameters answer for themselves: `copy` and `pickle` ask the object before its class, so both find the
masters, and no hook of theirs, whatever the object is part of.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mptrain.core.errors import UserError
from mptrain.core.link import Link, is_link
from mptrain.precision import rounded
from mptrain.precision.flat import Entry, Flat
from mptrain.precision.master import Masters

OURS = ("__reduce_ex__", "save_pretrained")
"""what is set on modules, beside hooks"""
HOOK_TABLES = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")

Exposed = Callable[..., contextlib.AbstractContextManager[nn.Module]]


class Whole:
    """Hooks on every module of `model`, from `follow` to `remove`.

    masters: those of now; they are other ones after a rebuild. exposed: as of MasterOptimizer.
    """

    def __init__(self, model: nn.Module, masters: Callable[[], Masters], exposed: Exposed) -> None:
        self._model, self._masters, self._exposed = model, masters, exposed
        self._handles: dict[nn.Module, list[RemovableHandle]] = {}
        self._handed: tuple[Any, weakref.WeakValueDictionary[int, Tensor]] | None = None
        self._loads = 0
        self._loading = contextlib.ExitStack()

    def follow(self) -> None:
        """Install on modules that are new."""
        for module in self._model.modules():
            if module not in self._handles:
                self._handles[module] = [
                    module.register_state_dict_post_hook(Link(self._hand_out)),
                    module.register_load_state_dict_pre_hook(Link(self._before_load)),
                    module.register_load_state_dict_post_hook(Link(self._after_load)),
                ]
                vars(module)["__reduce_ex__"] = _Reduced(module)
                if callable(getattr(type(module), "save_pretrained", None)):
                    vars(module)["save_pretrained"] = _Saver(module, self._exposed)

    def remove(self) -> None:
        for module, handles in self._handles.items():
            for handle in handles:
                handle.remove()
            for name in OURS:
                vars(module).pop(name, None)
        self._handles = {}

    def _hand_out(self, module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        masters = self._masters()
        for name, p in module._parameters.items():
            found = masters.by_id.get(id(p))
            value = state.get(prefix + name)
            # with keep_vars a caller wants the very parameters
            if found is None or isinstance(value, nn.Parameter) or not isinstance(value, Tensor):
                continue
            flat, entry = found
            if flat.half is not None:
                state[prefix + name] = self._joined(state, flat, entry) if flat.split else master_of(flat, entry)

    def _joined(self, state: dict[str, Any], flat: Flat, entry: Entry) -> Tensor:
        """One tensor for all names of a tied parameter, in one state dict."""
        if self._handed is None or self._handed[0]() is not state:
            self._handed = weakref.ref(state), weakref.WeakValueDictionary()
        known = self._handed[1].get(id(entry))
        if known is None:
            known = self._handed[1][id(entry)] = master_of(flat, entry)
        return known

    def _before_load(self, module: nn.Module, state: dict[str, Any], prefix: str = "", *_: Any) -> None:
        if self._loads == 0:  # the topmost module that is loaded
            rounded.keep_masters(module, self._masters(), state, prefix)
            self._loading.enter_context(self._exposed(write=True))
        self._loads += 1

    def _after_load(self, *_: Any) -> None:
        self._loads -= 1
        if self._loads == 0:
            self._loading.close()


def master_of(flat: Flat, entry: Entry) -> Tensor:
    """fp32 values of a half parameter; where something moved it, those that explain what it is now."""
    p = entry.parameter
    if p.data_ptr() == flat.view(flat.half, entry).data_ptr():
        return flat.read_master(entry)
    return flat.explain(entry, p.detach())


def answer_for(masters: Masters) -> None:
    """Make half parameters copy and pickle as their masters."""
    for flat in masters.flats:
        if flat.half is not None:
            for entry in flat.entries:
                entry.parameter.__deepcopy__ = _Copy(flat, entry)  # type: ignore[method-assign]
                entry.parameter.__reduce_ex__ = _Pickle(flat, entry)  # type: ignore[method-assign]


def forget(masters: Masters) -> None:
    for flat in masters.flats:
        for entry in flat.entries:
            vars(entry.parameter).pop("__deepcopy__", None)
            vars(entry.parameter).pop("__reduce_ex__", None)


class _Copy:
    def __init__(self, flat: Flat, entry: Entry) -> None:
        self.flat, self.entry = flat, entry

    def __call__(self, memo: dict[int, Any]) -> nn.Parameter:
        values = master_of(self.flat, self.entry).clone(memory_format=torch.preserve_format)
        return nn.Parameter(values, self.entry.parameter.requires_grad)


class _Pickle(_Copy):
    def __call__(self, protocol: Any) -> Any:
        values = master_of(self.flat, self.entry)
        return torch._utils._rebuild_parameter, (values, self.entry.parameter.requires_grad, OrderedDict())


class _Reduced:
    """What a module is copied and pickled from: all that is its own."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, protocol: Any) -> Any:
        reduced: Any = type(self._module).__reduce_ex__(self._module, protocol)
        make, arguments, state, *rest = reduced
        if isinstance(state, dict):
            ids = {i for hooks in state.values() if _are_hooks(hooks) for i, hook in hooks.items() if is_link(hook)}
            state = {k: _without(v, ids) if k.endswith(HOOK_TABLES) else v for k, v in state.items() if k not in OURS}
        return (make, arguments, state, *rest)


def _are_hooks(value: Any) -> bool:
    return isinstance(value, dict) and any(is_link(v) for v in value.values())


def _without(hooks: Any, ids: set[Any]) -> Any:
    return type(hooks)((k, v) for k, v in hooks.items() if k not in ids) if isinstance(hooks, dict) else hooks


class _Saver:
    """`save_pretrained` of a model, called while its parameters are fp32."""

    def __init__(self, owner: nn.Module, exposed: Exposed) -> None:
        self._owner, self._exposed = owner, exposed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._exposed():
            return type(self._owner).save_pretrained(self._owner, *args, **kwargs)  # type: ignore[attr-defined]


def refuse_tracing(*_: Any) -> None:
    """A pre-hook of the model: what is traced would hold half weights and the casts of training."""
    if torch.jit.is_tracing() or (torch.compiler.is_compiling() and torch.compiler.is_exporting()):
        raise UserError(
            "the model is traced for an export while it computes in half, so the export would hold half weights and"
            " the casts of training: export inside `with master_weights.exposed():`, or after release()"
        )
