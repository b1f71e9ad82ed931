"""The step's two passes in Triton, for CUDA devices: one launch each, whatever the number of parameters.

Gradients stay where autograd left them. A table of pieces (address, place in the Flat, length), made on
the host and sent in one copy, tells each program what to work on: `PIECE` elements of one gradient. The
norm writes one partial sum a piece, added in float64 in a fixed order, so results are deterministic.
Moments of 8 bits are decoded, updated and encoded (moments8.py) a few blocks at a time, in the same pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mptrain.precision import moments8
from mptrain.precision.flat import Flat
from mptrain.precision.step import AdamRule, Rule, Run

PIECE = 4096
BLOCK = 1024
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

ADAM = tl.constexpr(0)
MOMENTUM = tl.constexpr(1)
SGD = tl.constexpr(2)
QUIET_NAN = tl.constexpr(0x7FC00000)
CODED = tl.constexpr(moments8.BLOCK)
DROPPED_FIRST, DROPPED_SECOND = (tl.constexpr(moments8.DROPPED[name]) for name in (moments8.FIRST, moments8.SECOND))
REACH = tl.constexpr(moments8.REACH)
GRADUAL = tl.constexpr(moments8.GRADUAL)
ALONG = tl.constexpr(moments8.ALONG)
BINADE = tl.constexpr(1 << moments8.EXPONENT)


class TritonKernel:
    """`mptrain.precision.step.Kernel` for one CUDA device."""

    def sync(self, flat: Flat) -> None:
        flat.sync()  # one launch

    def norm(self, run: Run) -> Tensor:
        pieces = _pieces(run)
        sums = torch.empty(len(pieces), device=run.flat.device)
        _norm[(len(pieces),)](pieces, sums, TYPES[run.gradients[0].dtype], BLOCK)
        return sums.double().sum()

    def update(self, run: Run, rule: Rule, factor: float) -> None:
        flat = run.flat
        if flat.coded:
            self._update_coded(run, rule, factor)
            return
        states = [flat.state(name) for name in rule.states]
        kind = ADAM if isinstance(rule, AdamRule) else MOMENTUM if states else SGD
        unused = _weights(flat)  # an argument must be a tensor also where the kernel does not touch it
        first, second = ([*states, unused, unused])[:2]
        constants = (*rule.constants, *(0.0,) * 8)[:8]
        pieces = _pieces(run)
        _update[(len(pieces),)](
            pieces,
            unused if flat.master is None else flat.master,
            unused if flat.half is None else flat.half,
            unused if flat.low is None else flat.low,
            first,
            second,
            -factor if rule.maximize else factor,
            *constants,
            TYPES[run.gradients[0].dtype],
            kind.value,
            flat.half is not None,
            flat.low is not None,
            BLOCK,
        )

    @staticmethod
    def _update_coded(run: Run, rule: Rule, factor: float) -> None:
        flat, pieces = run.flat, _pieces(run)
        turns = [moments8.turn(name, rule.step) for name in (moments8.FIRST, moments8.SECOND)]
        _update_int8[(len(pieces),)](
            pieces,
            flat.half,
            flat.low,
            *(flat.state(name) for name in moments8.BUFFERS),
            -factor if rule.maximize else factor,
            *rule.constants,
            *(turn - (turn >> 31 << 32) for turn in turns),  # one type, so one compilation
            TYPES[run.gradients[0].dtype],
            BLOCK,
        )


def _weights(flat: Flat) -> Tensor:
    return flat.master if flat.half is None else flat.half


def _pieces(run: Run) -> Tensor:
    """[pieces, 3] int64: address of the gradient's elements, their place in the Flat, how many."""
    numels = torch.tensor([g.numel() for g in run.gradients])
    counts = (numels + PIECE - 1) // PIECE
    owner = torch.repeat_interleave(torch.arange(len(numels)), counts)
    begin = (torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]) * PIECE
    addresses = torch.tensor([g.data_ptr() for g in run.gradients])[owner]
    table = torch.stack(
        [
            addresses + begin * run.gradients[0].element_size(),
            torch.tensor(run.offsets)[owner] + begin,
            torch.minimum(numels[owner] - begin, torch.tensor(PIECE)),
        ],
        dim=1,
    )
    return table.to(run.flat.device)


@triton.jit
def _norm(pieces, sums, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    piece = tl.program_id(0)
    gradient = tl.load(pieces + 3 * piece).to(tl.pointer_type(TYPE))
    length = tl.load(pieces + 3 * piece + 2)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, BLOCK):
        place = start + tl.arange(0, BLOCK)
        g = tl.load(gradient + place, mask=place < length, other=0.0).to(tl.float32)
        total += g * g
    tl.store(sums + piece, tl.sum(total))


@triton.jit
def _joined(half, low, i, mask):
    """Masters of bf16 halves and remainders."""
    high = tl.load(half + i, mask=mask, other=0.0).to(tl.uint16, bitcast=True).to(tl.int32)
    return ((high << 16) + tl.load(low + i, mask=mask, other=0).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _split(p, half, low, i, mask):
    """Store masters as bf16 halves and remainders."""
    bits = p.to(tl.int32, bitcast=True)
    bits = tl.where(p == p, bits, QUIET_NAN)
    rounded = (bits + 0x8000) >> 16
    tl.store(half + i, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    tl.store(low + i, bits.to(tl.int16), mask=mask)


@triton.jit
def _update(
    pieces, master, half, low, first, second, factor, k0, k1, k2, k3, k4, k5, k6, k7,
    TYPE: tl.constexpr, KIND: tl.constexpr, HALF: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    gradient = tl.load(pieces + 3 * piece).to(tl.pointer_type(TYPE))
    offset = tl.load(pieces + 3 * piece + 1)
    length = tl.load(pieces + 3 * piece + 2)
    for start in range(0, length, BLOCK):
        place = start + tl.arange(0, BLOCK)
        mask = place < length
        i = offset + place
        if SPLIT:
            p = _joined(half, low, i, mask)
        else:
            p = tl.load(master + i, mask=mask, other=0.0)
        g = tl.load(gradient + place, mask=mask, other=0.0).to(tl.float32) * factor
        if KIND == ADAM:  # l2, decay, 1 - beta1, beta2, 1 - beta2, step size, 1 / sqrt(bias2), eps
            g += k0 * p
            m = tl.load(first + i, mask=mask, other=0.0)
            m += k2 * (g - m)
            v = k3 * tl.load(second + i, mask=mask, other=0.0) + k4 * (g * g)
            tl.store(first + i, m, mask=mask)
            tl.store(second + i, v, mask=mask)
            p = k1 * p - k5 * tl.div_rn(m, k6 * tl.sqrt_rn(v) + k7)
        elif KIND == MOMENTUM:  # l2, lr, momentum, share in the buffer, of the gradient, of the buffer
            g += k0 * p
            b = k2 * tl.load(first + i, mask=mask, other=0.0) + k3 * g
            tl.store(first + i, b, mask=mask)
            p -= k1 * (k4 * g + k5 * b)
        else:  # l2, lr
            p -= k1 * (g + k0 * p)
        if SPLIT:
            _split(p, half, low, i, mask)
        else:
            tl.store(master + i, p, mask=mask)
            if HALF:
                tl.store(half + i, p.to(half.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["turn1", "turn2"])
def _update_int8(
    pieces, half, low, first, second, first_exponents, second_exponents,
    factor, l2, decay, take1, beta2, take2, step_size, root_bias, eps, turn1, turn2,
    TYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    gradient = tl.load(pieces + 3 * piece).to(tl.pointer_type(TYPE))
    offset = tl.load(pieces + 3 * piece + 1)
    length = tl.load(pieces + 3 * piece + 2)
    for start in range(0, length, BLOCK):
        place = start + tl.arange(0, BLOCK)
        mask = place < length
        i = offset + place
        block = (offset + start) // CODED + tl.arange(0, BLOCK // CODED)
        filled = start + tl.arange(0, BLOCK // CODED) * CODED < length
        p = _joined(half, low, i, mask)
        g = tl.load(gradient + place, mask=mask, other=0.0).to(tl.float32) * factor + l2 * p
        base = _spread(tl.load(first_exponents + block, mask=filled, other=0), BLOCK)
        code = tl.load(first + i, mask=mask, other=0).to(tl.int32)
        size = (tl.abs(code) << DROPPED_FIRST) + base
        normal = (base + BINADE).to(tl.float32, bitcast=True)
        gradual = (size + BINADE).to(tl.float32, bitcast=True) - normal
        m = tl.where(tl.abs(code) < GRADUAL, gradual, size.to(tl.float32, bitcast=True))
        m = tl.where(code < 0, -m, m)
        m += take1 * (g - m)
        base = _spread(tl.load(second_exponents + block, mask=filled, other=0), BLOCK)
        code = tl.load(second + i, mask=mask, other=0).to(tl.int32)
        s = tl.where(code == 0, 0, (code << DROPPED_SECOND) + base).to(tl.float32, bitcast=True)
        s = tl.sqrt_rn(beta2 * (s * s) + take2 * (g * g))
        p = decay * p - step_size * tl.div_rn(m, root_bias * s + eps)
        _split(p, half, low, i, mask)

        along = i.to(tl.uint32) * ALONG
        above = ((along + turn1.to(tl.uint32)) >> (32 - DROPPED_FIRST)).to(tl.int32)
        signed = m.to(tl.int32, bitcast=True)
        bits = signed & 0x7FFFFFFF
        top = tl.maximum(_tops(tl.where(mask & (bits != 0), bits + above, 0), BLOCK), REACH + 1)
        base = _spread(top, BLOCK)
        normal = (base + BINADE).to(tl.float32, bitcast=True)
        shifted = (bits.to(tl.float32, bitcast=True) + normal).to(tl.int32, bitcast=True) - BINADE
        bits = tl.where(bits < base + BINADE, shifted, bits)
        code = ((bits + above) >> DROPPED_FIRST) - (base >> DROPPED_FIRST)
        tl.store(first + i, tl.where(signed < 0, -code, code).to(tl.int8), mask=mask)
        tl.store(first_exponents + block, top.to(tl.uint8), mask=filled)
        above = ((along + turn2.to(tl.uint32)) >> (32 - DROPPED_SECOND)).to(tl.int32)
        bits = s.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        bits = tl.where(mask & (bits != 0), bits + above, 0)
        top = _tops(bits, BLOCK)
        code = (bits >> DROPPED_SECOND) - (_spread(top, BLOCK) >> DROPPED_SECOND)
        tl.store(second + i, tl.where(bits == 0, 0, tl.maximum(code, 1)).to(tl.uint8), mask=mask)
        tl.store(second_exponents + block, top.to(tl.uint8), mask=filled)


@triton.jit
def _tops(bits, BLOCK: tl.constexpr):
    """The exponent of the largest in each block."""
    return tl.max(tl.reshape(bits, (BLOCK // CODED, CODED)), axis=1) >> 23


@triton.jit
def _spread(exponents, BLOCK: tl.constexpr):
    """For each element the bits of the smallest fp32 number whose exponent has codes in its block."""
    base = (exponents.to(tl.int32) - REACH) * BINADE
    return tl.reshape(tl.broadcast_to(base[:, None], (BLOCK // CODED, CODED)), (BLOCK,))
