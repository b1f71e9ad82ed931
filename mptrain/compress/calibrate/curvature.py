"""Kronecker-factored curvature of Linears: covariances of their inputs and Grams of the gradients at their outputs.

For y = W x + b and tokens t of N examples, with g_t = ∂f/∂y_t of a scalar f of each example:

    G = Σ_t g_t g_tᵀ / N                                                     [outputs, outputs]
    H = (1 - ρ) · cov_w(x) + ρ · cov(x),   weights w_t = ‖g_t‖²              [inputs, inputs]

so that ½ tr(G ΔW H ΔWᵀ) is the rise of ½ (Δf)², summed over the directions of the output that f probes. Weighting the
tokens by their gradients matters: a plain covariance is ruled by tokens that the output never looks at. Padding does
not count.

What f is (`probe`): `logits` draws random signs for the contrasts between classes, so that E[g gᵀ] measures the squared
error of the centred logits and needs no labels. With very many classes (language models) most logits do not matter;
there targets are drawn from the model's own distribution (the Fisher information, Martens 2014).

One forward and backward pass a batch; sums in float64. Linears are taken in groups whose sums fit into `memory`
bytes, a pass over the batches to each group. Several ranks share the batches (ranks.py) with the bits of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.linalg import helmert
from torch import Tensor, nn

from mptrain.compress.calibrate.ranks import ALONE, Ranks, from_rank
from mptrain.compress.structure.fields import output_dim
from mptrain.core.errors import ModelError, UserError
from mptrain.core.progress import Progress, progress
from mptrain.core.signature import Batch

Probe = Callable[[nn.Module, dict[str, Tensor], torch.Generator], Tensor]
"""(model, batch, generator) -> a scalar, the sum over examples of what each is probed with."""

MEMORY = 2**30
"""bytes of sums that are held at once"""

MANY_CLASSES = 1024
"""from which on the probe of logits draws targets instead of signs"""

RHO = 0.1

ROUNDING = 1e-10
"""of a sum of products in float64 over many tokens, far above what it can be off by"""


@dataclass
class Curvature:
    """Sums over tokens of one Linear, float64."""

    examples: int
    tokens: float
    x: Tensor  # [inputs]
    xx: Tensor  # [inputs, inputs]
    weight: Tensor  # []
    wx: Tensor  # [inputs]
    wxx: Tensor  # [inputs, inputs]
    gg: Tensor  # [outputs, outputs]

    @classmethod
    def zeros(cls, inputs: int, outputs: int, device: torch.device) -> Curvature:
        def new(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            0, 0.0, new(inputs), new(inputs, inputs), new(), new(inputs), new(inputs, inputs), new(*[outputs] * 2)
        )

    def add(self, x: Tensor, g: Tensor) -> None:
        """x: [tokens, inputs], g: [tokens, outputs], without padding."""
        x, g = x.double(), g.double()
        w = g.square().sum(1)
        wx = x * w[:, None]
        self.tokens += len(x)
        self.x += x.sum(0)
        self.xx += x.T @ x  # not addmm: ranks add whole products up
        self.weight += w.sum()
        self.wx += wx.sum(0)
        self.wxx += x.T @ wx
        self.gg += g.T @ g

    def sums(self) -> list[Tensor]:
        return [self.x, self.xx, self.weight, self.wx, self.wxx, self.gg]

    def covariance(self, rho: float = RHO) -> tuple[Tensor, Tensor]:
        """H [inputs, inputs] and the mean of x [inputs] that the bias takes up. Without any gradient: rho is 1.

        H is a difference, of which the digits below ROUNDING of what it is taken from are none: its diagonal is larger
        by so much, or inputs that never change would seem to, by noise whose inverse is anything."""
        if not self.tokens:
            raise UserError("curvature needs calibration data: the batches hold no token")
        mean = self.x / self.tokens
        second = self.xx / self.tokens
        covariance = second - torch.outer(mean, mean)
        if float(self.weight) > 0.0:
            mean = self.wx / self.weight
            weighted = self.wxx / self.weight
            covariance = (1 - rho) * (weighted - torch.outer(mean, mean)) + rho * covariance
            second = (1 - rho) * weighted + rho * second
        covariance.diagonal().add_(ROUNDING * second.diagonal().mean())
        return covariance, mean

    def gram(self) -> Tensor:
        return self.gg / max(self.examples, 1)


def logits(model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """The default probe; see the module. Labels in the batch are left out."""
    outputs = model(**{k: v for k, v in batch.items() if k not in ("labels", "start_positions", "end_positions")})
    named = (
        outputs.items() if hasattr(outputs, "items") else enumerate([outputs] if torch.is_tensor(outputs) else outputs)
    )
    total: Tensor | None = None
    for _, value in named:
        if not (torch.is_tensor(value) and value.is_floating_point() and value.requires_grad and value.dim() > 1):
            continue
        z = value.float()
        with torch.no_grad():
            if z.shape[-1] > MANY_CLASSES:
                p = z.softmax(-1)
                # the inverse of the cumulative distribution, with numbers drawn on the CPU: the same on every device
                at = torch.rand(z.shape[:-1], generator=generator).to(z.device)[..., None]
                drawn = (p.cumsum(-1) < at * p.sum(-1, keepdim=True)).sum(-1, keepdim=True).clamp_max(z.shape[-1] - 1)
                v = p.scatter_add(-1, drawn, -torch.ones_like(drawn, dtype=p.dtype))
            else:
                contrasts = _contrasts(z.shape[-1])
                signs = torch.randint(0, 2, (*z.shape[:-1], len(contrasts)), generator=generator) * 2.0 - 1.0
                v = (signs @ contrasts).to(z.device)
            mask = batch.get("attention_mask")
            if mask is not None and z.dim() > 2 and z.shape[:2] == mask.shape:
                v = v * mask[..., None]
        total = (z * v).sum() + (0.0 if total is None else total)
    if total is None:
        raise ModelError(f"{type(model).__name__} gives no float output that depends on its weights: nothing to probe")
    return total


def _contrasts(classes: int) -> Tensor:
    """Orthonormal rows [classes - 1, classes] that span the centred logits; [[1]] for a single output."""
    return torch.tensor(helmert(classes) if classes > 1 else [[1.0]], dtype=torch.float32)


def curvatures(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    *,
    probe: Probe = logits,
    seed: int = 0,
    memory: int = MEMORY,
    ranks: Ranks = ALONE,
) -> Iterator[dict[str, Curvature]]:
    """Yield the curvatures of the Linears `names`, a group at a time, on every rank.

    batches: keyword arguments of the model, the same on every rank; moved to the model's device. The model runs in
    eval mode and is left as it was. Raises UserError without batches, ModelError for gradients that are not finite or
    a Linear that never ran.
    """
    if not batches:
        raise UserError("curvature needs calibration data: data.calibration gave no batch")
    groups = list(_groups(model, names, memory))
    for number, group in enumerate(groups, 1):
        with progress(f"curvature, pass {number} of {len(groups)}", len(batches), unit="batch") as bar:
            found = _pass(model, group, batches, probe, seed, ranks, bar)
        yield found


def _groups(model: nn.Module, names: Sequence[str], memory: int) -> Iterator[list[str]]:
    group: list[str] = []
    used = 0
    for name in names:
        inputs, outputs = _shape(model, name)
        need = 8 * (2 * inputs * inputs + outputs * outputs)
        if group and used + need > memory:
            yield group
            group, used = [], 0
        group.append(name)
        used += need
    if group:
        yield group


def _shape(model: nn.Module, name: str) -> tuple[int, int]:
    """Inputs and outputs of a Linear, or of transformers' Conv1D."""
    sizes = model.get_parameter(f"{name}.weight").shape
    made = output_dim(model.get_submodule(name)) or 0
    return sizes[1 - made], sizes[made]


def _pass(
    model: nn.Module,
    names: list[str],
    batches: Sequence[Batch],
    probe: Probe,
    seed: int,
    ranks: Ranks,
    bar: Progress,
) -> dict[str, Curvature]:
    device = next(model.parameters()).device

    def empty() -> dict[str, Curvature]:
        return {name: Curvature.zeros(*_shape(model, name), device) for name in names}

    total = empty()
    trainable = [p for p in model.parameters() if p.requires_grad]
    training = model.training
    watch = _Watch(model, names)
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        for first in range(0, len(batches), ranks.count):
            turn = range(first, min(first + ranks.count, len(batches)))
            part = empty() if ranks.count > 1 else total
            number = first + ranks.index
            if number in turn:
                batch = {k: v.to(device) for k, v in batches[number].items()}
                generator = torch.Generator().manual_seed(seed + number)
                with watch.batch(batch, part):
                    probe(model, batch, generator).backward()
            if ranks.count > 1:
                _add_in_order(total, part, [batches[i] for i in turn], ranks)
            bar.update(len(turn))
    finally:
        watch.close()
        for parameter in trainable:
            parameter.requires_grad_(True)
        model.train(training)
    for name, found in total.items():
        if not found.tokens:
            raise ModelError(f"{name} never ran on the calibration data, so nothing is known about it")
        if not all(bool(torch.isfinite(t).all()) for t in found.sums()):
            raise ModelError(f"{name}: its inputs or gradients on the calibration data are not finite; check the data")
    return total


def _add_in_order(
    total: dict[str, Curvature], part: dict[str, Curvature], batches: list[Mapping[str, Tensor]], ranks: Ranks
) -> None:
    """Add what a turn's batches gave, in their order, on every rank."""
    for name, sums in total.items():
        for rank in range(len(batches)):
            own = part[name] if rank == ranks.index else None
            count = torch.tensor([own.tokens, own.examples] if own else [0.0, 0.0], dtype=torch.float64)
            counts = from_rank(rank, count)
            sums.tokens += float(counts[0])
            sums.examples += int(counts[1])
            for target, mine in zip(sums.sums(), part[name].sums()):
                target += from_rank(rank, mine.clone() if own else torch.zeros_like(mine))


class _Watch:
    """Hooks that bring the inputs of Linears and the gradients at their outputs together."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self._into: dict[str, Curvature] = {}
        self._mask: Tensor | None = None
        self._handles = [model.get_submodule(n).register_forward_hook(self._hook(n)) for n in names]

    def batch(self, batch: Mapping[str, Tensor], into: dict[str, Curvature]) -> _Watch:
        mask = batch.get("attention_mask")
        self._mask = mask.bool() if mask is not None and mask.dim() == 2 else None
        self._into = into
        examples = len(next(iter(batch.values())))
        for curvature in into.values():
            curvature.examples += examples
        return self

    def __enter__(self) -> None:
        torch.set_grad_enabled(True)

    def __exit__(self, *_: object) -> None:
        self._into = {}

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not self._into:
                return
            if not output.requires_grad:  # the first Linear: from here on there is a graph
                output.requires_grad_(True)
            x, into, mask = inputs[0].detach(), self._into[name], self._mask

            def backward(gradient: Tensor) -> None:
                if mask is not None and x.shape[:2] == mask.shape:
                    into.add(x[mask], gradient[mask])
                else:
                    into.add(x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1]))

            output.register_hook(backward)

        return forward
