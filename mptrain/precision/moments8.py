"""Adam's moments in 8 bits each: small floats, whose exponents count down from the largest of their block.

    exp_avg       int8    [n]          sign, 3 bits of exponent, 4 of mantissa: of m
    exp_avg_sq    uint8   [n]          3 bits of exponent, 5 of mantissa: of sqrt(v)
    *_exponents   uint8   [n / BLOCK]  the exponent of a block's largest, as fp32 has it: one for m, one for sqrt(v)

    bits(value) = (exponent - 7 << 23) + (|code| << 23 - mantissa)

A code is the upper bits of an fp32 number, and code 0 is zero; the exponent of the block says which 2^8 have codes, and
nothing else: a number that has one keeps it when its neighbours grow, and what was decoded encodes to the same code.
Codes of m below 16 are gradual, as in IEEE formats: multiples of 2^(exponent - 10). sqrt(v) has none of these: below
the codes it becomes the smallest one, so steps there get shorter. A code of m is within 1/16 of what it stands for or
within 2^(exponent - 10), one of sqrt(v) within 1/32 or too large. So whatever stands beside an element in its block, no
step is longer than with fp32 moments by more than a tenth of itself and an eighth of the block's longest.

Rounding. v moves by 1 - beta2 of itself in a step, a thousandth: to the nearest it would come back to the same code
for ever. So code = floor(x + t) with t = frac(A i + r(step)) of element i, A the plastic number's inverse, where r
covers [0, 1) evenly. As with random t the mean over steps is x, but jumps come more regularly: less noise, no random
state, and all ranks and kernels round alike. For sqrt(v) r = B step, B the golden ratio; as codes stay where they are,
its noise, 5%, biases v by 1% at most. m falls by a tenth where gradients are zero (rows of an embedding), as steadily
as that walk goes on: rounded by it, such an m is 1 to 2% too small in the mean. So for m r takes the eighths of [0, 1)
in a random order, anew every 8 steps, from a random beginning: half as much noise as with random t, and 0.1%.

Block-wise 8-bit states: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization; exponents of blocks: Open
Compute Project 2023, Microscaling Formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

BLOCK = 64
"""elements that share an exponent: 2 bytes in 64 parameters"""
EXPONENT, REACH = 23, 7
"""where in fp32 the exponent begins, and how many exponents below that of the block have codes"""
FIRST, SECOND = "exp_avg", "exp_avg_sq"
DROPPED = {FIRST: 19, SECOND: 18}
"""lower bits of fp32 that have no code"""
GRADUAL = 16
"""codes of m below this are multiples of one number"""
EXPONENTS = {FIRST: "exp_avg_exponents", SECOND: "exp_avg_sq_exponents"}
BUFFERS = {
    FIRST: (torch.int8, 1),
    SECOND: (torch.uint8, 1),
    EXPONENTS[FIRST]: (torch.uint8, BLOCK),
    EXPONENTS[SECOND]: (torch.uint8, BLOCK),
}
"""by name: dtype, and how many elements share a value"""
STRIDE = "stride"
"""of a parameter whose codes are handed out: blocks follow one another in memory order"""
ALONG, TURN = 0xC13FA9A9, 0x9E3779B9
"""A and B of the rounding, times 2^32"""
PARTS = 8
"""steps in which the rounding of m covers [0, 1)"""


def turn(name: str, step: int) -> int:
    """r of a moment's rounding at optimizer step `step`, times 2^32."""
    if name == SECOND:
        return step * TURN & 0xFFFFFFFF
    group, place = divmod(step, PARTS)
    random = _mixed(group)
    begin, order, left = random >> 32, random & 0xFFFFFFFF, list(range(PARTS))
    for _ in range(place):
        order, taken = divmod(order, len(left))
        del left[taken]
    return (begin + left[order % len(left)] * (1 << 32) // PARTS) & 0xFFFFFFFF


def _mixed(number: int) -> int:
    """64 bits that look random (Steele et al. 2014, SplitMix)."""
    z = (number + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    z = (z ^ z >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    return z ^ z >> 31


def thresholds(name: str, start: int, stop: int, step: int, device: torch.device) -> Tensor:
    """[stop - start] int32 from 0 to 2^31: t of a moment's elements in the flat buffers at optimizer step `step`."""
    along = torch.arange(start, stop, device=device) * ALONG + turn(name, step)
    return ((along & 0xFFFFFFFF) >> 1).int()


def encode(name: str, values: Tensor, threshold: Tensor | int = 1 << 30) -> tuple[Tensor, Tensor]:
    """(codes [n], exponents [n / BLOCK]) of a moment [n] fp32; n: whole blocks.

    threshold: as `thresholds` gives it; default: to the nearest.
    """
    if name == SECOND:
        values = values.double().sqrt_().float()  # the nearest, as kernels have it; MKL's fp32 root need not be that
    dropped, whole = DROPPED[name], EXPONENT - DROPPED[name]
    threshold = threshold >> (31 - dropped)
    signed = values.view(torch.int32)
    bits = signed & 0x7FFFFFFF
    rounded = ((bits + threshold) >> dropped).masked_fill_(bits == 0, 0)
    exponents = rounded.view(-1, BLOCK).amax(1) >> whole
    if name == SECOND:
        codes = (rounded - _spread((exponents - REACH) << whole)).clamp_(min=1).masked_fill_(bits == 0, 0)
        return codes.to(torch.uint8), exponents.to(torch.uint8)
    exponents.clamp_(min=REACH + 1)
    codes = rounded - _spread((exponents - REACH) << whole)
    normal = _spread((exponents - REACH + 1) << EXPONENT)
    shifted = (bits.view(torch.float32) + normal.view(torch.float32)).view(torch.int32)
    codes = torch.where(bits < normal, ((shifted + threshold) >> dropped) - (normal >> dropped), codes)
    return torch.where(signed < 0, -codes, codes).to(torch.int8), exponents.to(torch.uint8)


def decode(name: str, codes: Tensor, exponents: Tensor) -> Tensor:
    """The moment [n] fp32 of its codes [n] and the exponents [n / BLOCK, rounded up] of their blocks."""
    codes = codes.int()
    size, base = codes.abs(), _spread((exponents.int() - REACH) << EXPONENT)[: len(codes)]
    bits = (size << DROPPED[name]) + base
    if name == SECOND:
        return bits.masked_fill_(codes == 0, 0).view(torch.float32).square_()
    lift = (size < GRADUAL).int() << EXPONENT
    values = (bits + lift).view(torch.float32) - ((base + lift) * (lift != 0)).view(torch.float32)
    return torch.where(codes < 0, -values, values)


def _spread(of_blocks: Tensor) -> Tensor:
    return of_blocks.repeat_interleave(BLOCK)


def size(elements: int) -> int:
    """Bytes of both moments of whole blocks."""
    return sum(dtype.itemsize * elements // shared for dtype, shared in BUFFERS.values())


# -- in the state of an optimizer


def is_coded(state: Mapping[str, Any]) -> bool:
    """Whether the state of a parameter holds codes."""
    return EXPONENTS[FIRST] in state


def decoded(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a parameter as torch's Adam has it; one that is so already as it is."""
    if not is_coded(state):
        return dict(state)
    stride = tuple(state[STRIDE])
    found = {k: v for k, v in state.items() if k not in (*BUFFERS, STRIDE)}
    for name in (FIRST, SECOND):
        codes = state[name]
        flat = torch.empty_strided(codes.shape, stride, dtype=codes.dtype, device=codes.device).copy_(codes)
        values = decode(name, flat.as_strided((codes.numel(),), (1,)), state[EXPONENTS[name]])
        found[name] = values.as_strided(codes.shape, stride)
    return found


def plain(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict of an optimizer with fp32 moments, as torch's Adam loads it."""
    return {**state_dict, "state": {index: decoded(state) for index, state in state_dict["state"].items()}}
