"""Fake quantization with learned ranges (Esser et al. 2020, arXiv 1902.08153).

With step s > 0, integer zero point z and levels qmin … qmax:

    q = clip(round(x / s) + z, qmin, qmax)        y = (q - z) · s

A symmetric quantizer learns `scale`, the largest value: s = scale / qmax, z = 0. An
asymmetric one learns `low` and `range`: s = range / (qmax - qmin), z = round(-low / s). Zero is
always a level: padding and pruned channels stay exactly zero. Gradients, with rounding taken
as the identity and -z·s as low:

               dy/dx   dy/ds               dy/dlow
    inside       1     round(x / s) - x / s   0
    q < qmin     0     qmin                   1
    q > qmax     0     qmax                   1

On a CPU with a compiler, forward and backward are one C pass each over memory, 20 times
faster than NNCF's C++ extension, with the same bits as torch.fake_quantize_per_*_affine,
which is what an exported graph holds. Elsewhere the same operations run in torch: no
synchronisation with a GPU, no extension to build.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.core import native
from mptrain.core.errors import ModelError

_BLOCK = 16384  # BLOCK of the C file
_TINY = 1e-12  # a range that training drove to zero still divides


def _kernels() -> ctypes.CDLL | None:
    return native.load(Path(__file__).with_suffix(".c"), "fake quantization")


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: Tensor | None, zero: Tensor, qmin: int, qmax: int) -> Tensor:
        ctx.save_for_backward(x, step, zero)
        ctx.limits, ctx.has_low = (qmin, qmax), low is not None
        if _compiled(x):
            return _forward_native(x.contiguous(), step, zero, qmin, qmax)
        q = x.float() * (1 / step)
        return q.round_().add_(zero).clamp_(qmin, qmax).sub_(zero).mul_(step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, step, zero = ctx.saved_tensors
        qmin, qmax = ctx.limits
        if _compiled(x) and dy.dtype == x.dtype:
            dx, inside, below, above = _backward_native(dy.contiguous(), x.contiguous(), step, zero, qmin, qmax)
        else:
            u = x.float() * (1 / step)
            k = u.round()
            under, over = k + zero < qmin, k + zero > qmax
            dx = dy.masked_fill(under | over, 0)
            inside = (dx.float() * (k - u)).sum_to_size(step.shape)
            below, above = (dy.float() * mask for mask in (under, over))
            below, above = below.sum_to_size(step.shape), above.sum_to_size(step.shape)
        dstep = inside + qmin * below + qmax * above
        return dx, dstep, below + above if ctx.has_low else None, None, None, None


def _compiled(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and _kernels() is not None


def _layout(x: Tensor, step: Tensor) -> tuple[int, int, int]:
    """(rows, inner, channels): the tensor as rows that have one step each."""
    channels = step.numel()
    if channels == 1:
        return 1, x.numel(), 1
    axis = x.dim() - step.dim() + next(i for i, n in enumerate(step.shape) if n > 1)
    rows = x.shape[: axis + 1].numel()
    return rows, x.numel() // max(rows, 1), channels


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _arguments(x: Tensor, step: Tensor, zero: Tensor, qmin: int, qmax: int) -> list[Any]:
    sizes = [ctypes.c_int64(n) for n in _layout(x, step)]
    return [*sizes, _pointer(step), _pointer(zero), ctypes.c_float(qmin), ctypes.c_float(qmax)]


def _forward_native(x: Tensor, step: Tensor, zero: Tensor, qmin: int, qmax: int) -> Tensor:
    step, zero, y = step.contiguous(), zero.contiguous(), torch.empty_like(x)
    _kernels().fake_quant_forward(_pointer(x), _pointer(y), *_arguments(x, step, zero, qmin, qmax))  # type: ignore[union-attr]
    return y


def _backward_native(dy: Tensor, x: Tensor, step: Tensor, zero: Tensor, qmin: int, qmax: int) -> tuple[Tensor, ...]:
    step, zero, dx = step.contiguous(), zero.contiguous(), torch.empty_like(x)
    rows, inner, channels = _layout(x, step)
    sums = torch.zeros(rows // channels, channels, -(-inner // _BLOCK), 3, dtype=torch.float64)
    _kernels().fake_quant_backward(  # type: ignore[union-attr]
        _pointer(dy), _pointer(x), _pointer(dx), *_arguments(x, step, zero, qmin, qmax), _pointer(sums)
    )
    inside, below, above = sums.sum((0, 2)).float().unbind(-1)
    return dx, inside.view_as(step), below.view_as(step), above.view_as(step)


def fake_quantize(x: Tensor, step: Tensor, zero: Tensor, qmin: int, qmax: int, low: Tensor | None = None) -> Tensor:
    """y of the module docstring.

    x: float tensor. step, zero: float32, one element or one channel axis, broadcasting to x,
    e.g. [768, 1] for a weight [768, 3072]. low: given when the zero point follows it; it then
    gets a gradient. Gradients flow to x, step and low.
    """
    return _FakeQuantize.apply(x, step, low, zero, qmin, qmax)


class FakeQuantizer(nn.Module):
    """A fake quantizer with trainable ranges of the given shape, e.g. [1] or [out_features, 1].

    narrow: drop the lowest level of a signed quantizer, so that the levels are symmetric.
    weight_of: name of the module whose weight it quantizes; None for activations.
    """

    def __init__(
        self,
        *,
        bits: int,
        symmetric: bool,
        signed: bool,
        narrow: bool,
        shape: tuple[int, ...],
        weight_of: str | None = None,
    ):
        super().__init__()
        self.bits, self.symmetric, self.signed, self.narrow, self.weight_of = bits, symmetric, signed, narrow, weight_of
        if symmetric:
            self.scale = nn.Parameter(torch.ones(shape))
        else:
            self.low = nn.Parameter(torch.zeros(shape))
            self.range = nn.Parameter(torch.ones(shape))

    @property
    def levels(self) -> tuple[int, int]:
        """(qmin, qmax)"""
        if not (self.symmetric and self.signed):
            return 0, 2**self.bits - 1
        half = 2 ** (self.bits - 1)
        return -half + self.narrow, half - 1

    @property
    def shape(self) -> torch.Size:
        return (self.scale if self.symmetric else self.range).shape

    def grid(self) -> tuple[Tensor, Tensor]:
        """(step, zero point) as float32 of `shape`; step carries gradients."""
        qmin, qmax = self.levels
        if self.symmetric:
            step = (self.scale.abs() + _TINY) / qmax
            return step, torch.zeros_like(step)
        step = (self.range.abs() + _TINY) / qmax
        with torch.no_grad():
            # Widen the range to hold zero, then as little more as puts zero on the grid.
            low = self.low.clamp(max=0)
            high = (self.low + self.range.abs() + _TINY).clamp(min=0)
            zero = (-low * qmax / (high - low)).round_().clamp_(qmin, qmax)
            tuned = torch.maximum(-low / zero.clamp(min=1), high / (qmax - zero).clamp(min=1))
        return step + (tuned - step).detach(), zero

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # NNCF's mode would step into every operation here
            step, zero = self.grid()
            self._check_fits(x)
            return fake_quantize(x, step, zero, *self.levels, low=None if self.symmetric else self.low)

    def _check_fits(self, x: Tensor) -> None:
        """NNCF knows an operation by its module and its turn there, so that a layer that was added takes the quantizer
        of another; and the kernels trust the shape."""
        shape = self.shape
        aligned = zip(reversed(shape), reversed(x.shape), strict=False)
        if shape.numel() > 1 and (len(shape) > x.dim() or any(n not in (1, size) for n, size in aligned)):
            name = f"the quantizer of {self.weight_of}" if self.weight_of else "a quantizer"
            raise ModelError(
                f"{name} has ranges of shape {list(shape)} and is given {list(x.shape)}: layers were added to or"
                " taken from the model after it was quantized, adapters perhaps; merge these first, then quantize"
            )

    def frozen(self) -> FrozenQuantizer:
        """The same quantizer as one torch operation with constants, for tracing."""
        with torch.no_grad():
            step, zero = self.grid()
        return FrozenQuantizer(step, zero, self.levels)

    def extra_repr(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.bits} bits, {kind}, levels {self.levels}, shape {tuple(self.shape)}"


class FrozenQuantizer(nn.Module):
    """torch.fake_quantize_per_*_affine with constants, which converters know."""

    step: Tensor
    zero: Tensor

    def __init__(self, step: Tensor, zero: Tensor, levels: tuple[int, int]):
        super().__init__()
        self.levels = levels
        self.axis = next((i for i, n in enumerate(step.shape) if n > 1), None)
        self.register_buffer("step", step.detach().reshape(-1).clone())
        self.register_buffer("zero", zero.detach().reshape(-1).to(torch.int32))
        self.single = (float(self.step[0]), int(self.zero[0]))

    def forward(self, x: Tensor) -> Tensor:
        if self.axis is None:
            return torch.fake_quantize_per_tensor_affine(x, *self.single, *self.levels)
        return torch.fake_quantize_per_channel_affine(x, self.step, self.zero, self.axis, *self.levels)
