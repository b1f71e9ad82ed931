"""The step's two passes in Triton, for CUDA devices: one launch each, whatever the number of parameters.

Gradients stay where autograd left them. A table of pieces (address, place in the Flat, length), made on
the host and sent in one copy, tells each program what to work on: `PIECE` elements of one gradient. The
norm writes one partial sum a piece, added in float64 in a fixed order, so results are deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mptrain.precision.flat import Flat
from mptrain.precision.step import AdamRule, Rule, Run

PIECE = 4096
BLOCK = 1024
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

ADAM = tl.constexpr(0)
MOMENTUM = tl.constexpr(1)
SGD = tl.constexpr(2)
QUIET_NAN = tl.constexpr(0x7FC00000)


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
            high = tl.load(half + i, mask=mask, other=0.0).to(tl.uint16, bitcast=True).to(tl.int32)
            p = ((high << 16) + tl.load(low + i, mask=mask, other=0).to(tl.int32)).to(tl.float32, bitcast=True)
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
            bits = p.to(tl.int32, bitcast=True)
            bits = tl.where(p == p, bits, QUIET_NAN)
            rounded = (bits + 0x8000) >> 16
            tl.store(half + i, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
            tl.store(low + i, bits.to(tl.int16), mask=mask)
        else:
            tl.store(master + i, p, mask=mask)
            if HALF:
                tl.store(half + i, p.to(half.dtype.element_ty), mask=mask)
