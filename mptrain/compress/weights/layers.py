"""Which modules have a weight that is compressed, and how its rows lie."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)
"""y = x Wᵀ + b; Conv1D, of the GPT-2 family, holds W transposed, [in, out]"""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
"""rows of W, [out, in / groups, …], are the outputs; of transposed convolutions they are not, which stay as they are"""


def is_transposed(module: nn.Module) -> bool:
    """Whether the outputs are columns of the module's weight."""
    return isinstance(module, Conv1D)


def groups_of(module: nn.Module) -> int:
    """How many equal parts of the outputs have inputs of their own."""
    return module.groups if isinstance(module, CONVOLUTIONS) else 1
