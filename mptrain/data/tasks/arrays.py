"""Arrays at the two ends of a model: examples of different lengths as one tensor, an output as numbers to score."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mptrain.core.errors import MptrainError, NotFinite
from mptrain.core.signature import Outputs


def finite(outputs: Outputs, name: str = "logits") -> np.ndarray:
    """One output as a float32 array. Raises MptrainError when it is missing, NotFinite."""
    if name not in outputs:
        raise MptrainError(f"The model has no output {name!r}, which its task needs; it has {', '.join(outputs)}.")
    value = outputs[name]
    array = value.detach().float().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value, np.float32)
    if not np.isfinite(array).all():
        raise NotFinite(
            f"The model's {name} hold {(~np.isfinite(array)).sum()} values of {array.size} that are not finite in one"
            " batch, so it cannot be scored. Weights that diverged in training (lower the lr) or a precision that"
            " overflows are the usual causes."
        )
    return array


def stack(arrays: Iterable[Any], fill: float, length: int | None = None) -> Tensor:
    """Arrays [s_i, ...] as one tensor [b, s, ...], padded with `fill` (or cut) to `length` or to the longest."""
    arrays = [np.asarray(a) for a in arrays]
    size = max(len(a) for a in arrays) if length is None else length
    whole = np.full((len(arrays), size, *arrays[0].shape[1:]), fill, dtype=arrays[0].dtype)
    for row, array in zip(whole, arrays):
        row[: len(array)] = array[:size]
    return torch.from_numpy(whole)
