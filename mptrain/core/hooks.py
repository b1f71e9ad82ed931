"""Whether a model carries quantizers; known here so that asking does not import NNCF."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

HOOKS = "__nncf_hooks"
"""The submodule in which NNCF keeps a model's quantizers; known here so that asking for it does not import NNCF."""


LEFT = "_mptrain_left"
"""The attribute of a quantized model that says what was asked to stay in float: {"modules": [names], "operations":
{scope: how many calls of that function the module makes}}, JSON"""


def is_quantized(model: nn.Module) -> bool:
    return HOOKS in model._modules


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Within it, a model that carries quantizers runs as if it had none."""
    hooked = vars(model).get("forward") if is_quantized(model) else None
    if hooked is None:
        yield
        return
    vars(model)["forward"] = hooked.orig_forward
    try:
        yield
    finally:
        vars(model)["forward"] = hooked
