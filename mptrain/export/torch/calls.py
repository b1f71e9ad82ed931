"""Arguments that a converter of traces does not read, written out while a model is traced.

A trace holds every argument of an operation, and translations leave some of them out without a word:
`softplus(x, beta=2)` becomes softplus(x). Calls of these functions are replaced by others that mean the same as they
are made, in the model's forward pass. For exported graphs `arguments.py` does the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mptrain.core.errors import ExportError
from mptrain.export.torch import arguments

Call = Callable[..., Any]


class WrittenOut(TorchFunctionMode):
    """For the length of a `with` block.

    calls: by function of torch, what to call instead with the same arguments; NotImplemented where they are at their
    defaults, ExportError where there is no other way to write it.
    """

    def __init__(self, calls: Mapping[Any, Call]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        written = self.calls.get(func)
        result = NotImplemented if written is None else written(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is NotImplemented else result


def softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Any:
    """x above the threshold; from 20 on there is no difference in fp32."""
    if beta == 1 and threshold >= 20:
        return NotImplemented
    smooth = functional.softplus(input * beta) / beta
    return smooth if threshold >= 20 else torch.where(input * beta > threshold, input, smooth)


def rounded(input: Tensor, *, decimals: int = 0) -> Any:
    if decimals == 0:
        return NotImplemented
    scale = 10.0 ** abs(decimals)
    return (input * scale).round() / scale if decimals > 0 else (input / scale).round() * scale


def variance(input: Tensor, *places: Any, **options: Any) -> Any:
    """Translations know corrections of 0 and 1, and axes that are named."""
    if places and isinstance(places[0], bool):
        options["unbiased"], places = places[0], places[1:]
    options |= dict(zip(("dim", "unbiased", "keepdim"), places))
    correction = options.get("correction", int(options.get("unbiased", True)))
    correction = 1 if correction is None else correction
    dim = options.get("dim", options.get("axis"))
    if correction in (0, 1) and dim is not None:
        return NotImplemented
    axes = list(range(input.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    keep = options.get("keepdim", False)
    if correction in (0, 1):
        return torch.var(input, axes, correction=correction, keepdim=keep)
    count = math.prod(input.shape[axis] for axis in axes)
    return torch.var(input, axes, correction=0, keepdim=keep) * (count / (count - correction))


def deviation(input: Tensor, *places: Any, **options: Any) -> Any:
    found = variance(input, *places, **options)
    return found if found is NotImplemented else found.sqrt()


def with_mean(spread: Call) -> Call:
    def both(input: Tensor, dim: Any = None, **options: Any) -> Any:
        if isinstance(dim, bool):
            return NotImplemented
        found = spread(input, dim, **options)
        if found is NotImplemented:
            return found
        axes = list(range(input.dim())) if dim is None else dim
        return found, input.mean(axes, options.get("keepdim", False))

    return both


def clamp(input: Tensor, min: Any = None, max: Any = None) -> Any:
    tensors = isinstance(min, Tensor) or isinstance(max, Tensor)
    return arguments.clamp(input, min, max) if tensors else NotImplemented


def reciprocal(input: Tensor, one: Any = 1) -> Any:
    """As `one / input`, too, which a trace holds as the same."""
    found = arguments.reciprocal(input)
    return found if found is NotImplemented or one == 1 else found * one


def rms_norm(input: Tensor, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Tensor:
    return arguments.rms_norm(input, normalized_shape, weight, eps)


def avg_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """OpenVINO counts the padding beyond the last whole window otherwise than torch."""
    padded = any(padding) if isinstance(padding, (tuple, list)) else bool(padding)
    if ceil_mode and padded and count_include_pad:
        raise ExportError(
            "export: avg_pool2d(ceil_mode=True, count_include_pad=True) with padding is computed otherwise by the"
            " converter than by torch. Set ceil_mode or count_include_pad to False, pad before the pooling, or use"
            " another format."
        )
    return NotImplemented


COMMON: dict[Any, Call] = {
    functional.softplus: softplus,
    torch.round: rounded,
    Tensor.round: rounded,
    torch.var: variance,
    Tensor.var: variance,
    torch.std: deviation,
    Tensor.std: deviation,
    torch.var_mean: with_mean(variance),
    torch.std_mean: with_mean(deviation),
}
OPENVINO = COMMON | {functional.avg_pool2d: avg_pool2d}
COREML = COMMON | {
    functional.rms_norm: rms_norm,
    torch.clamp: clamp,
    Tensor.clamp: clamp,
    torch.reciprocal: reciprocal,
    Tensor.reciprocal: reciprocal,
    Tensor.__rtruediv__: reciprocal,
}
