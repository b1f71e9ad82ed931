"""A model as it computes in half precision, without an optimizer: for looking at it and timing it."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

from torch import nn

from mptrain.precision.casting import add_casts
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
    add_casts(half, kept, policy.dtype)
    return half
