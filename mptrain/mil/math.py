"""What the arithmetic operations of a MIL program compute, in torch.

Semantics are those of coremltools' `converters.mil.mil.ops.defs`, iOS 15 to 18. Every function
takes the operation's parameters by name: tensors (float32, int64 or bool; scalars have no
axes) and strings. Rounding to float16 is the interpreter's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Operation = Callable[..., Any]

INTEGERS = {
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "uint16": torch.uint16,
    "int32": torch.int32,
}


def unary(function: Callable[[Tensor], Tensor]) -> Operation:
    def apply(x: Tensor) -> Tensor:
        return function(x)

    return apply


def binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operation:
    def apply(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    return apply


def cast(x: Tensor, dtype: str) -> Tensor:
    """Floats keep their value here; the interpreter rounds what is declared float16."""
    if dtype in ("fp16", "fp32"):
        return x.float()
    if dtype == "bool":
        return x.bool()
    return x.to(torch.int64).to(INTEGERS[dtype]).to(torch.int64)


def real_div(x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def thresholded_relu(x: Tensor, alpha: Any = 1.0) -> Tensor:
    return torch.where(x >= alpha, x, 0.0)


def relu6(x: Tensor) -> Tensor:
    return x.clamp(0, 6)


def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


def leaky_relu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x >= 0, x, alpha * x)


def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x >= 0, x, alpha.reshape(-1, *[1] * (x.dim() - 2)) * x)


def elu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x >= 0, x, alpha * torch.expm1(x))


def sigmoid_hard(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


def scaled_tanh(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return alpha * torch.tanh(beta * x)


def clamped_relu(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.minimum(leaky_relu(x, alpha), beta)


def linear_activation(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return alpha * x + beta


def threshold(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.maximum(x, alpha)


def clip(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, alpha), beta)


def inverse(x: Tensor, epsilon: Tensor) -> Tensor:
    return 1 / (x + epsilon)


def rsqrt(x: Tensor, epsilon: Tensor) -> Tensor:
    return torch.rsqrt(x + epsilon)


def log(x: Tensor, epsilon: Tensor) -> Tensor:
    return torch.log(x + epsilon)


def softmax(x: Tensor, axis: Tensor) -> Tensor:
    return torch.softmax(x, int(axis))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def matmul(x: Tensor, y: Tensor, transpose_x: Any = False, transpose_y: Any = False) -> Tensor:
    x = x.transpose(-1, -2) if bool(transpose_x) and x.dim() > 1 else x
    y = y.transpose(-1, -2) if bool(transpose_y) and y.dim() > 1 else y
    return torch.matmul(x, y)


def einsum(values: list[Tensor], equation: str) -> Tensor:
    return torch.einsum(equation, *values)


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)


def layer_norm(
    x: Tensor, axes: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: Any = 1e-5
) -> Tensor:
    over = tuple(sorted(int(a) % x.dim() for a in axes))
    centred = x - x.mean(over, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(over, keepdim=True) + float(epsilon))
    shape = [x.shape[a] if a in over else 1 for a in range(x.dim())]
    normal = normal if gamma is None else normal * gamma.reshape(shape)
    return normal if beta is None else normal + beta.reshape(shape)


def batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, eps=float(epsilon))


def instance_norm(x: Tensor, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5) -> Tensor:
    return F.instance_norm(x, weight=gamma, bias=beta, eps=float(epsilon))


def l2_norm(x: Tensor, epsilon: Any = 1e-6) -> Tensor:
    over = tuple(range(max(x.dim() - 3, 0), x.dim()))
    return x * torch.rsqrt(x.square().sum(over, keepdim=True) + float(epsilon))


def reduction(function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Operation:
    def apply(x: Tensor, axes: Tensor | None = None, keep_dims: Any = False) -> Tensor:
        over = tuple(range(x.dim())) if axes is None else tuple(int(a) for a in axes)
        return function(x, over, bool(keep_dims))

    return apply


def _prod(x: Tensor, over: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((a % x.dim() for a in over), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _mean(x: Tensor, over: tuple[int, ...], keep: bool) -> Tensor:
    return x.mean(over, keepdim=keep) if x.is_floating_point() else x.double().mean(over, keepdim=keep).long()


def arg_reduction(function: Callable[..., Tensor]) -> Operation:
    def apply(x: Tensor, axis: Any = -1, keep_dims: Any = False, output_dtype: str = "int32") -> Tensor:
        return function(x, int(axis), keepdim=bool(keep_dims))

    return apply


def conv(
    x: Tensor,
    weight: Tensor,
    pad_type: str = "valid",
    strides: Tensor | None = None,
    pad: Tensor | None = None,
    dilations: Tensor | None = None,
    groups: Any = 1,
    bias: Tensor | None = None,
) -> Tensor:
    count = x.dim() - 2
    stride = [1] * count if strides is None else strides.tolist()
    dilation = [1] * count if dilations is None else dilations.tolist()
    padded = F.pad(x, _padding(x, pad_type, pad, list(weight.shape[2:]), stride, dilation))
    convolve = (F.conv1d, F.conv2d, F.conv3d)[count - 1]
    return convolve(padded, weight, bias, stride, 0, dilation, int(groups))


def max_pool(
    x: Tensor, kernel_sizes: Tensor, pad_type: str = "valid", strides: Any = None, pad: Any = None, ceil_mode: Any = 0
) -> Tensor:
    return _pool(
        x, kernel_sizes, pad_type, strides, pad, ceil_mode, -math.inf, F.max_pool1d, F.max_pool2d, F.max_pool3d
    )


def avg_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    pad_type: str = "valid",
    strides: Any = None,
    pad: Any = None,
    exclude_padding_from_average: Any = False,
    ceil_mode: Any = False,
) -> Tensor:
    pools = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
    mean = _pool(x, kernel_sizes, pad_type, strides, pad, ceil_mode, 0.0, *pools)
    if not bool(exclude_padding_from_average):
        return mean
    return mean / _pool(torch.ones_like(x), kernel_sizes, pad_type, strides, pad, ceil_mode, 0.0, *pools)


def _pool(
    x: Tensor, kernel: Tensor, pad_type: str, strides: Any, pad: Any, ceil: Any, fill: float, *pools: Any
) -> Tensor:
    sizes = kernel.tolist()
    stride = [1] * len(sizes) if strides is None else strides.tolist()
    padded = F.pad(x, _padding(x, pad_type, pad, sizes, stride, [1] * len(sizes)), value=fill)
    return pools[len(sizes) - 1](padded, sizes, stride, ceil_mode=bool(ceil))


def _padding(
    x: Tensor, pad_type: str, pad: Tensor | None, kernel: list[int], stride: list[int], dilation: list[int]
) -> list[int]:
    """For F.pad: pairs (before, after), the last axis first."""
    pairs = [(0, 0)] * len(kernel)
    if pad_type == "custom" and pad is not None:
        flat = pad.tolist()
        pairs = [(flat[2 * i], flat[2 * i + 1]) for i in range(len(kernel))]
    elif pad_type in ("same", "same_lower"):
        for i, (k, s, d) in enumerate(zip(kernel, stride, dilation)):
            size = x.shape[2 + i]
            total = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
            less, more = total // 2, total - total // 2
            pairs[i] = (less, more) if pad_type == "same" else (more, less)
    return [n for pair in reversed(pairs) for n in pair]


def quantize(
    input: Tensor, scale: Tensor, output_dtype: str, zero_point: Tensor | None = None, axis: Any = None
) -> Tensor:
    low, high = (0, 255) if output_dtype == "uint8" else (-128, 127)
    scale, zero = _along(scale, input, axis), 0 if zero_point is None else _along(zero_point, input, axis)
    return (torch.round(input / scale) + zero).clamp(low, high).long()


def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: Any = None) -> Tensor:
    zero = 0 if zero_point is None else _along(zero_point, input, axis)
    return (input - zero).float() * _along(scale, input, axis)


def _along(parameter: Tensor, x: Tensor, axis: Any) -> Tensor:
    if parameter.dim() == 0 or axis is None:
        return parameter
    return parameter.reshape([-1 if i == int(axis) % x.dim() else 1 for i in range(x.dim())])


_UNARY = "abs acos asin atan atanh ceil cos cosh erf exp exp2 floor logical_not round sigmoid sign sin sinh sqrt"
_UNARY += " square tan tanh relu"

MATH: dict[str, Operation] = {
    **{name: unary(getattr(torch, name)) for name in _UNARY.split()},
    "silu": unary(F.silu),
    "softplus": unary(lambda x: F.softplus(x, threshold=1e9)),
    "softsign": unary(F.softsign),
    "identity": unary(lambda x: x),
    "relu6": relu6,
    "thresholded_relu": thresholded_relu,
    "gelu": gelu,
    "leaky_relu": leaky_relu,
    "prelu": prelu,
    "elu": elu,
    "sigmoid_hard": sigmoid_hard,
    "scaled_tanh": scaled_tanh,
    "clamped_relu": clamped_relu,
    "linear_activation": linear_activation,
    "threshold": threshold,
    "clip": clip,
    "inverse": inverse,
    "rsqrt": rsqrt,
    "log": log,
    "cast": cast,
    "softmax": softmax,
    "add": binary(torch.add),
    "sub": binary(torch.sub),
    "mul": binary(torch.mul),
    "real_div": real_div,
    "floor_div": binary(torch.floor_divide),
    "mod": binary(torch.remainder),
    "maximum": binary(torch.maximum),
    "minimum": binary(torch.minimum),
    "pow": binary(torch.pow),
    "equal": binary(torch.eq),
    "not_equal": binary(torch.ne),
    "greater": binary(torch.gt),
    "greater_equal": binary(torch.ge),
    "less": binary(torch.lt),
    "less_equal": binary(torch.le),
    "logical_and": binary(torch.logical_and),
    "logical_or": binary(torch.logical_or),
    "logical_xor": binary(torch.logical_xor),
    "linear": linear,
    "matmul": matmul,
    "einsum": einsum,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "layer_norm": layer_norm,
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "l2_norm": l2_norm,
    "conv": conv,
    "max_pool": max_pool,
    "avg_pool": avg_pool,
    "quantize": quantize,
    "dequantize": dequantize,
    "reduce_sum": reduction(lambda x, over, keep: x.sum(over, keepdim=keep)),
    "reduce_mean": reduction(_mean),
    "reduce_max": reduction(lambda x, over, keep: x.amax(over, keepdim=keep)),
    "reduce_min": reduction(lambda x, over, keep: x.amin(over, keepdim=keep)),
    "reduce_prod": reduction(_prod),
    "reduce_l1_norm": reduction(lambda x, over, keep: x.abs().sum(over, keepdim=keep)),
    "reduce_l2_norm": reduction(lambda x, over, keep: x.square().sum(over, keepdim=keep).sqrt()),
    "reduce_sum_square": reduction(lambda x, over, keep: x.square().sum(over, keepdim=keep)),
    "reduce_log_sum": reduction(lambda x, over, keep: x.sum(over, keepdim=keep).log()),
    "reduce_log_sum_exp": reduction(lambda x, over, keep: torch.logsumexp(x, over, keepdim=keep)),
    "reduce_argmax": arg_reduction(torch.argmax),
    "reduce_argmin": arg_reduction(torch.argmin),
}
