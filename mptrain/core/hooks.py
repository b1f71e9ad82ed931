"""Whether a model carries quantizers; known here so that asking does not import NNCF."""

from __future__ import annotations

from torch import nn

HOOKS = "__nncf_hooks"
"""The submodule in which NNCF keeps a model's quantizers; known here so that asking for it does not import NNCF."""


def is_quantized(model: nn.Module) -> bool:
    return HOOKS in model._modules
