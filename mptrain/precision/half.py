"""A model as it computes in half precision, without an optimizer: for looking at it and timing it."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Sequence

from torch import nn

from mptrain.precision.casting import Casts
from mptrain.precision.master import slots
from mptrain.precision.policy import Compute, Policy, kept_in_fp32


def pattern(module: str) -> str:
    """What `keep_fp32` takes to keep this module and what is below it, and nothing else."""
    return f"re:^{re.escape(module)}\\."


def in_half(model: nn.Module, keep_fp32: Sequence[str], compute: Compute = "fp16") -> nn.Module:
    """A copy in eval mode that computes as `MasterWeights` makes it. Raises ModelError when everything is kept."""
    policy = Policy(compute, keep_fp32=keep_fp32)
    half = copy.deepcopy(model).eval()
    kept = kept_in_fp32(half, policy)
    for p in half.parameters():
        if p.is_floating_point() and id(p) not in kept.parameters:
            p.data = p.data.to(policy.dtype)
    Casts(half, kept, policy.dtype).install()
    return half


@contextlib.contextmanager
def computing_in(model: nn.Module, keep_fp32: Sequence[str], compute: Compute) -> Iterator[None]:
    """Inside, an fp32 `model` computes as `MasterWeights` makes it; afterwards it is as it was, bit for bit.

    Stand-ins take the place of its parameters. Raises ModelError when everything is kept.
    """
    policy = Policy(compute, keep_fp32=keep_fp32)
    kept = kept_in_fp32(model, policy)
    stand_ins = {
        id(p): nn.Parameter(p.detach().to(policy.dtype), p.requires_grad)
        for p in model.parameters()
        if p.is_floating_point() and id(p) not in kept.parameters
    }
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
