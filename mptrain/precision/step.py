"""The optimizer step on flat buffers, in blocks that fit the cache.

    pass 1   sum of squares of all gradients; one number says both norm and finiteness
    pass 2   p, moments <- rule(p, moments, factor * gradient);  half weight <- p

where factor = clip coefficient / loss scale. Gradients are read where autograd left them. A
`Kernel` does the two passes for a `Run`: neighbours in a Flat that take the same update. Three
kernels keep this contract: `TorchKernel` here, which needs nothing and is always there; compiled
C++ (native.py); Triton (triton_kernel.py). A sum of squares above 3.4e38 counts as an overflow.

Rules follow torch.optim: Adam (Kingma & Ba 2015), AdamW (Loshchilov & Hutter 2019), SGD with
momentum. What they do not cover (amsgrad, other optimizers) steps on the masters themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mptrain.core.errors import ModelError, UserError
from mptrain.precision import moments8
from mptrain.precision.accumulate import fold
from mptrain.precision.flat import BLOCK, Entry, Flat
from mptrain.precision.policy import is_number
from mptrain.precision.split import join, split


@dataclass(frozen=True)
class AdamRule:
    """Adam, or AdamW when decoupled, at optimizer step `step` (the first is 1)."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool
    step: int

    states = ("exp_avg", "exp_avg_sq")

    @classmethod
    def of(cls, group: Mapping[str, Any], step: int) -> AdamRule:
        beta1, beta2 = (float(b) for b in group["betas"])
        return cls(
            float(group["lr"]),
            beta1,
            beta2,
            float(group["eps"]),
            float(group["weight_decay"]),
            group["decoupled_weight_decay"],
            group["maximize"],
            step,
        )

    @property
    def constants(self) -> tuple[float, ...]:
        """After the factor: l2, decay, 1 - beta1, beta2, 1 - beta2, step size, 1 / sqrt(bias2), eps."""
        return (
            0.0 if self.decoupled else self.weight_decay,
            1.0 - self.lr * self.weight_decay if self.decoupled else 1.0,
            1.0 - self.beta1,
            self.beta2,
            1.0 - self.beta2,
            self.lr / (1.0 - self.beta1**self.step),
            1.0 / math.sqrt(1.0 - self.beta2**self.step),
            self.eps,
        )

    def apply(self, p: Tensor, g: Tensor, states: list[Tensor], scale: Tensor) -> None:
        """Update p and states in place with g / scale."""
        (torch._fused_adamw_ if self.decoupled else torch._fused_adam_)(
            [p],
            [g],
            states[:1],
            states[1:],
            [],
            [torch.full((), float(self.step), device=p.device)],
            lr=self.lr,
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=self.weight_decay,
            eps=self.eps,
            amsgrad=False,
            maximize=self.maximize,
            grad_scale=scale,
        )


@dataclass(frozen=True)
class SgdRule:
    """SGD, with momentum unless that is 0."""

    lr: float
    momentum: float
    dampening: float
    nesterov: bool
    weight_decay: float
    maximize: bool
    step: int

    @classmethod
    def of(cls, group: Mapping[str, Any], step: int) -> SgdRule:
        return cls(
            float(group["lr"]),
            float(group["momentum"]),
            float(group["dampening"]),
            group["nesterov"],
            float(group["weight_decay"]),
            group["maximize"],
            step,
        )

    @property
    def states(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()

    @property
    def constants(self) -> tuple[float, ...]:
        """After the factor: l2, lr; with momentum: momentum, share of the gradient in the buffer and in the update."""
        if not self.momentum:
            return (self.weight_decay, self.lr)
        keep = 1.0 if self.step == 1 else 1.0 - self.dampening  # torch starts the buffer with the whole gradient
        return (
            self.weight_decay,
            self.lr,
            self.momentum,
            keep,
            float(self.nesterov),
            self.momentum if self.nesterov else 1.0,
        )

    def apply(self, p: Tensor, g: Tensor, states: list[Tensor], scale: Tensor) -> None:
        """Update p and states in place with g / scale."""
        torch._fused_sgd_(
            [p],
            [g],
            states,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            lr=self.lr,
            dampening=self.dampening,
            nesterov=self.nesterov,
            maximize=self.maximize,
            is_first_step=self.step == 1,
            grad_scale=scale,
        )


Rule = AdamRule | SgdRule


def rule_of(optimizer: torch.optim.Optimizer) -> type[AdamRule] | type[SgdRule] | None:
    """The rule that does what the optimizer's step does; None when there is none."""
    if type(optimizer) is torch.optim.SGD:
        rule: type[AdamRule] | type[SgdRule] = SgdRule
    elif type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        rule = AdamRule
    else:
        return None
    plain = not any(g.get("amsgrad") or g["differentiable"] for g in optimizer.param_groups)
    return rule if plain else None


@dataclass
class Run:
    """Entries that lie one after the other and take the same update.

    gradients: 1-d, of the Flat's dtype or fp32; offsets: where in the Flat each belongs.
    """

    flat: Flat
    group: int
    step: int
    """updates before this one"""
    entries: list[Entry] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)


def collect(flat: Flat) -> list[Run]:
    """The runs of a Flat: its parameters that have a gradient, by optimizer group and number of updates.

    Raises ModelError for sparse gradients.
    """
    grads = [e.parameter.grad for e in flat.entries]
    gathered = any(e.accumulated or e.reduced for e in flat.entries)
    if gathered or any(g is not None and g.dtype != flat.dtype for g in grads):
        fold(flat)
        gathered = True
    runs: list[Run] = []
    run: Run | None = None
    for entry, updates, grad in zip(flat.entries, flat.steps.tolist(), grads, strict=True):
        if entry.group is None or not (entry.accumulated if gathered else grad is not None):
            run = None
            continue
        if run is None or (run.group, run.step) != (entry.group, updates):
            run = Run(flat, entry.group, int(updates))
            runs.append(run)
        run.entries.append(entry)
        if grad is not None and not gathered:
            run.gradients.append(_dense(grad, entry))
            run.offsets.append(entry.offset)
    if gathered:
        for run in runs:
            start, stop = run.entries[0].offset, run.entries[-1].offset + run.entries[-1].numel
            run.gradients, run.offsets = [flat.gradients()[start:stop]], [start]
    return runs


def _dense(grad: Tensor, entry: Entry) -> Tensor:
    """The gradient 1-d, in the memory order of its parameter."""
    if grad.layout != torch.strided:
        raise ModelError(
            f"{entry.name} has a sparse gradient; masters need a dense one: build its layer with sparse=False"
        )
    if grad.stride() != entry.stride:
        grad = torch.empty_strided(entry.shape, entry.stride, dtype=grad.dtype, device=grad.device).copy_(grad)
    return grad.as_strided((entry.numel,), (1,))


class Kernel(Protocol):
    def sync(self, flat: Flat) -> None:
        """half <- master, in place; allocates nothing."""
        ...

    def norm(self, run: Run) -> Tensor | float:
        """Sum of squares of the run's gradients; non-finite when one of them is."""
        ...

    def update(self, run: Run, rule: Rule, factor: float) -> None:
        """Update masters, moments and half weights in place with factor * gradient."""
        ...


class TorchKernel:
    """Eager torch on one device; its temporaries are a few blocks, whatever the size of the model."""

    def __init__(self, device: torch.device) -> None:
        self.block = BLOCK << 1 if device.type == "cpu" else BLOCK << 7  # there, fewer launches matter more
        self.gradient = torch.empty(0, device=device)
        self.master = torch.empty(0, device=device)

    def sync(self, flat: Flat) -> None:
        flat.sync()

    def norm(self, run: Run) -> Tensor | float:
        sums = []
        for _, _, g in self._blocks(run):
            sums.append(torch.dot(g, g))
        return torch.stack(sums).double().sum()

    def update(self, run: Run, rule: Rule, factor: float) -> None:
        flat = run.flat
        buffers = [] if flat.coded else [flat.state(name) for name in rule.states]
        scale = torch.full((), 1.0 / factor, device=flat.device)  # torch's fused optimizers divide by it on the way
        for start, stop, g in self._blocks(run):
            if flat.coded:
                self._update_coded(flat, rule, start, g, scale)
                continue
            states = [b[start:stop] for b in buffers]
            if flat.low is not None:
                high, low = flat.half[start:stop], flat.low[start:stop]
                p = join(high, low, out=self.master[: stop - start])
                rule.apply(p, g, states, scale)
                split(p, high, low)
            else:
                p = flat.master[start:stop]
                rule.apply(p, g, states, scale)
                if flat.half is not None:
                    flat.half[start:stop].copy_(p)

    @staticmethod
    def _update_coded(flat: Flat, rule: Rule, start: int, g: Tensor, scale: Tensor) -> None:
        """Of split masters whose moments have 8 bits; start: where a block begins."""
        whole = nn.functional.pad(g, (0, -len(g) % moments8.BLOCK))
        stop = start + len(whole)
        exponents = {name: flat.state(moments8.EXPONENTS[name]) for name in rule.states}
        blocks = slice(start // moments8.BLOCK, stop // moments8.BLOCK)
        states = [moments8.decode(n, flat.state(n)[start:stop], exponents[n][blocks]) for n in rule.states]
        high, low = flat.half[start:stop], flat.low[start:stop]
        p = join(high, low)
        rule.apply(p, whole, states, scale)
        split(p, high, low)
        for name, values in zip(rule.states, states, strict=True):
            threshold = moments8.thresholds(name, start, stop, rule.step, flat.device)
            flat.state(name)[start:stop], exponents[name][blocks] = moments8.encode(name, values, threshold)

    def _blocks(self, run: Run) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, gradient [stop - start] fp32): slices of large gradients, small ones gathered."""
        if not self.gradient.numel():
            size = min(self.block, run.flat.trained)
            self.gradient, self.master = self.gradient.new_empty(size), self.master.new_empty(size)
        group: list[tuple[int, Tensor]] = []
        for offset, gradient in zip(run.offsets, run.gradients, strict=True):
            if group and offset + gradient.numel() - group[0][0] > len(self.gradient):
                yield self._gather(group)
                group = []
            if gradient.numel() <= len(self.gradient):
                group.append((offset, gradient))
                continue
            for start in range(0, gradient.numel(), len(self.gradient)):
                yield self._gather([(offset + start, gradient[start : start + len(self.gradient)])])
        if group:
            yield self._gather(group)

    def _gather(self, group: list[tuple[int, Tensor]]) -> tuple[int, int, Tensor]:
        start, stop = group[0][0], group[-1][0] + group[-1][1].numel()
        block = self.gradient[: stop - start]
        if len(group) == 1:
            block.copy_(group[0][1])
        else:
            block.zero_()  # also between parameters
            torch._foreach_copy_([block[o - start : o - start + g.numel()] for o, g in group], [g for _, g in group])
        return start, stop, block


def checked_max_norm(max_norm: Any) -> float | None:
    """None or 0: no clipping. Raises UserError for what is no norm."""
    if max_norm is not None and not (is_number(max_norm) and max_norm >= 0):
        raise UserError(f"max_grad_norm must be None or a number of at least 0, got {max_norm!r}")
    return max_norm


def clip_factor(norm: float, max_norm: float | None) -> float:
    """What torch.nn.utils.clip_grad_norm_ multiplies gradients with."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
