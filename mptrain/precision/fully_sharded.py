"""A model that FSDP2 shards: what of it stays in fp32, and the way back to an ordinary model.

`fully_shard` casts all that one call gathers to one dtype. So what is kept in fp32 is sharded by itself, before what is
around it:

    casts      the hooks of a half model (casting.py), put on while it is whole
    kept       fully_shard without a cast for every module that `keep_fp32` names, that has running statistics, or that
               is a fake quantizer
    the rest   fully_shard by whoever shards the model, with the policy of `half_policy`
    restore    parameters are whole again, on the CPU, classes and hooks of the modules what they were

FSDP's own hooks run operations in the middle of a forward pass. They are hidden from torch-function modes: NNCF numbers
the operations of a module by what it sees, and casts look at every one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mptrain.core.errors import ModelError
from mptrain.precision import rounded
from mptrain.precision.casting import Casts
from mptrain.precision.meeting import own_half
from mptrain.precision.memory import blocks
from mptrain.precision.policy import Kept, Policy, kept_in_fp32

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_LATER = ("generate",)
"""methods that others wrap for FSDP once it is there"""


def half_policy(policy: Policy) -> MixedPrecisionPolicy:
    """Half copies of fp32 shards, gradients summed in fp32; inputs are left to the casts."""
    return MixedPrecisionPolicy(policy.dtype, torch.float32, cast_forward_inputs=False)


class Sharding:
    """What `model` was before it is sharded. policy: None where it computes in fp32.

    Raises ModelError when what is kept in fp32 cannot be gathered by itself.
    """

    def __init__(self, model: nn.Module, policy: Policy | None) -> None:
        self.model = model
        self._was = {m: (type(m), set(vars(m)), _tables(m)) for m in model.modules()}
        self._added: dict[nn.Module, set[str]] = {}
        self.kept: list[nn.Module] = []
        """modules to shard by themselves"""
        self._casts: Casts | None = None
        if policy is not None:
            trained = [p for p in model.parameters() if p.requires_grad]
            rounded.tell_of(trained)
            for p in trained:
                p.data = p.data.float()
            kept = kept_in_fp32(model, policy)
            self.kept = list(_alone(model, kept))
            halved = {id(p) for p in model.parameters() if p.is_floating_point()} - kept.parameters
            half = {m for m in model.modules() if own_half(m, lambda p: id(p) in halved)}
            self._casts = Casts(model, kept, policy.dtype, half.__contains__).install()

    @contextmanager
    def begin(self, **options: Any) -> Iterator[None]:
        """Inside, `fully_shard` is called on the rest of the model. options: of fully_shard for what is kept."""
        before = {m: _hooks(m) for m in self._was}
        for module in self.kept:
            fully_shard(module, **options)
        yield
        for module, (_, names, _) in self._was.items():
            self._added[module] = set(vars(module)) - names
            _hide(module, before[module])

    @torch.no_grad()
    def restore(self) -> None:
        """Make the model an ordinary one, whole and fp32, on the CPU. Every process takes part and gets all of it."""
        reshard(self.model)
        if self._casts is not None:
            self._casts.remove()
        whole: dict[int, nn.Parameter] = {}
        for module, (kind, names, tables) in self._was.items():
            for name, p in module._parameters.items():
                if isinstance(p, DTensor):
                    if id(p) not in whole:
                        whole[id(p)] = nn.Parameter(p.full_tensor().cpu().clone(), p.requires_grad)
                    module._parameters[name] = whole[id(p)]
            module.__class__ = kind
            for name in self._added.get(module, set()) | (set(_LATER) - names):
                vars(module).pop(name, None)
            for table, entries in tables:
                table.clear()
                table.update(entries)
            _module_state_mapping.pop(module, None)
        self.model.to("cpu")  # buffers


class _Hidden:
    """A hook whose operations no torch-function mode sees."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return self.hook(*args, **kwargs)


def _hooks(module: nn.Module) -> list[set[Any]]:
    return [set(vars(module)[hooks]) for hooks in _HOOKS]


def _hide(module: nn.Module, known: list[set[Any]]) -> None:
    """The hooks that a module got since it had those `known`, of `_hooks`."""
    for hooks, before in zip(_HOOKS, known):
        table = vars(module)[hooks]
        table.update({key: _Hidden(hook) for key, hook in table.items() if key not in before})


def _tables(module: nn.Module) -> list[tuple[dict, dict]]:
    """The dictionaries of a module (hooks, modules), and what is in them."""
    held = {k: v for k, v in vars(module).items() if isinstance(v, dict) and k not in ("_parameters", "_buffers")}
    return [(table, dict(table)) for table in held.values()]


def _alone(model: nn.Module, kept: Kept) -> Iterator[nn.Module]:
    """The modules that own what is kept in fp32. Raises ModelError."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = {id(p): n for n, p in module._parameters.items() if p is not None and id(p) in kept.parameters}
        if not own:
            continue
        first = f"{name}.{next(iter(own.values()))}".removeprefix(".")
        if seen & own.keys():
            raise ModelError(f"precision.keep_fp32: {first} is tied to another weight, which FSDP2 cannot gather alone")
        seen |= own.keys()
        if any(p.is_floating_point() and id(p) not in kept.parameters for p in module.parameters()):
            raise ModelError(
                f"precision.keep_fp32: {first} stands in a module with others below it that compute in half, and FSDP2"
                f" gathers a module in one dtype: name all of {name or type(model).__name__}, or none of it"
            )
        yield module


# -- sharded tensors


def shard_blocks(model: nn.Module) -> None:
    """Shard a model that is not trained, a teacher: each block that transformers does not split, and the rest."""
    if isinstance(model, FSDPModule):
        return
    for module in [*blocks(model), model]:
        before = _hooks(module)
        fully_shard(module, reshard_after_forward=True)
        _hide(module, before)


def reshard(model: nn.Module) -> None:
    """Let its parameters be the shards: the outermost ones stay whole after a forward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def second_names(model: nn.Module) -> dict[str, str]:
    """The further names of tied parameters, and the first of each."""
    first: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        first.setdefault(id(p), name)
    every = ((name, first[id(p)]) for name, p in model.named_parameters(remove_duplicate=False))
    return {name: one for name, one in every if name != one}


def distinct(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict without the second names of tied parameters; shards are DTensors."""
    reshard(model)
    second = second_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in second}


@torch.no_grad()
def gathered(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """`distinct`, whole and on the CPU. Every process takes part; without `keep` it gets nothing."""
    found: dict[str, Tensor] = {}
    for name, tensor in distinct(model).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = whole.detach().cpu().clone()
    return found
