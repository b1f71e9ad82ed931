"""A model as it computes in half precision, without an optimizer: for looking at it and timing it.

A CPU without half kernels takes many times as long for a product of half matrices. What is only looked at does not
wait for that: under `float_products` such products are made of their operands in fp32, summed in fp32 and rounded
once, which is what half kernels do. So what is found is also the same on every CPU.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mptrain.precision.casting import Casts
from mptrain.precision.master import slots
from mptrain.precision.policy import DTYPES, Compute, Kept, Policy, kept_in_fp32

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "convolution")
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def pattern(module: str) -> str:
    """What `keep_fp32` takes to keep this module and what is below it, and nothing else."""
    return f"re:^{re.escape(module)}\\."


def in_half(model: nn.Module, keep_fp32: Sequence[str], compute: Compute = "fp16") -> nn.Module:
    """A copy in eval mode that computes as `MasterWeights` makes it. Raises ModelError when everything is kept."""
    policy = Policy(compute, keep_fp32=keep_fp32)
    halves = _halves(model, kept_in_fp32(model, policy), policy.dtype)
    half = copy.deepcopy(model, halves).eval()  # no copies in fp32, which would be there for a while
    Casts(half, kept_in_fp32(half, policy), policy.dtype).install()
    return half


class float_products(TorchDispatchMode):
    """Inside, products of half tensors on the CPU are computed in fp32 and rounded once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        half = next((t.dtype for t in tree_leaves(args) if _is_half(t)), None)
        if half is None or (name not in _PRODUCTS and name != _ATTENTION):
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, lambda t: t.float() if _is_half(t) else t, (args, kwargs))
        made = func(*args, **kwargs)
        if name == _ATTENTION:  # what comes after the result are statistics, in fp32 in any case
            return made[0].to(half), *made[1:]
        return made.to(half)


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in DTYPES.values() and value.device.type == "cpu"


def _halves(model: nn.Module, kept: Kept, dtype: torch.dtype) -> dict[int, Any]:
    """By its id, for each parameter that is not kept in fp32, one of `dtype` with its values."""
    return {
        id(p): nn.Parameter(p.detach().to(dtype), p.requires_grad)
        for p in model.parameters()
        if p.is_floating_point() and id(p) not in kept.parameters
    }


@contextlib.contextmanager
def computing_in(model: nn.Module, keep_fp32: Sequence[str], compute: Compute) -> Iterator[None]:
    """Inside, an fp32 `model` computes as `MasterWeights` makes it; afterwards it is as it was, bit for bit.

    Stand-ins take the place of its parameters. Raises ModelError when everything is kept.
    """
    policy = Policy(compute, keep_fp32=keep_fp32)
    kept = kept_in_fp32(model, policy)
    stand_ins = _halves(model, kept, policy.dtype)
    swapped = [slot for slot in slots(model) if id(slot[2]) in stand_ins]
    for module, name, parameter in swapped:
        module._parameters[name] = stand_ins[id(parameter)]
    casts = Casts(model, kept, policy.dtype).install()
    try:
        yield
    finally:
        casts.remove()
        for module, name, parameter in swapped:
            module._parameters[name] = parameter
