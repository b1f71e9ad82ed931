"""Casts of an operation's operands, wherever they stand in its nested arguments.

What an operation writes into (`out=`) keeps its dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def is_fp32(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32


def floats(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from floats(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key != "out":
                yield from floats(item)


def down(value: Any, dtype: torch.dtype) -> Any:
    return _cast(value, torch.float32, dtype)


def up(value: Any, dtype: torch.dtype) -> Any:
    return _cast(value, dtype, torch.float32)


def as_it_is(value: Any, dtype: torch.dtype) -> Any:
    return value


def _cast(value: Any, source: torch.dtype, target: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(target) if value.dtype == source else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_cast(v, source, target) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(v, source, target) for v in value)
    if isinstance(value, dict):
        return {k: v if k == "out" else _cast(v, source, target) for k, v in value.items()}
    return value
