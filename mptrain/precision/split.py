"""An fp32 number as a bfloat16 and an int16: the compute weight is the high half of its own master.

    bits(x) = (bits(high) << 16) + low        low: signed, so high is x rounded half up

The sum is exact for every finite and infinite x: `high` is one more than the upper half of x
exactly when `low` is negative. A NaN is replaced by the one quiet NaN, since rounding up its payload
could carry into the sign. Rounding to nearest even is not possible with 16 bits: of the 2^17 numbers
that could round to one bfloat16, half up takes exactly 2^16.

Against an fp32 master beside a bf16 weight this saves 2 of 16 bytes a parameter (with fp32 moments),
and there is nothing to copy after a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUIET_NAN = 0x7FC00000


def split(x: Tensor, high: Tensor, low: Tensor) -> None:
    """Write fp32 `x` to bf16 `high` and int16 `low` (same shape)."""
    bits = torch.where(x.isnan(), QUIET_NAN, x.view(torch.int32))
    low.copy_(bits)  # the conversion keeps the lower 16 bits
    high.view(torch.int16).copy_((bits + 0x8000) >> 16)


def join(high: Tensor, low: Tensor, out: Tensor | None = None) -> Tensor:
    """The fp32 tensor that `split` was given, in `out` if that is given."""
    if out is None:
        out = torch.empty(high.shape, dtype=torch.float32, device=high.device)
    out.view(torch.int32).copy_(high.view(torch.int16)).bitwise_left_shift_(16).add_(low)
    return out
