"""How much the loss minds a change of each weight: the diagonal of the Fisher information.

    L(w + δ) ≈ L(w) + ½ Σ Fᵢ δᵢ²,    Fᵢ ≈ Σ_batches (∂L/∂wᵢ)²

(SqueezeLLM, arXiv 2306.07629.) One backward pass a batch. A gradient is squared, added up in
float32 and freed as soon as it is complete, so the sums of the wanted weights are all the
memory that this takes. A tied weight has one sum, of its whole gradient. Several ranks share
the batches (ranks.py); each then also holds the squares of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.compress.base import Batch, LossFn, model_loss
from mptrain.compress.calibrate.ranks import ALONE, Ranks, from_rank, rounds
from mptrain.core.errors import ModelError, UserError
from mptrain.core.progress import track


def fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    names: Iterable[str],
    loss_fn: LossFn = model_loss,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """Σ over batches of the squared gradient of each named weight, float32, in the weight's shape.

    batches: keyword arguments of the model with labels, the same on every rank; moved to the
    model's device. The model runs without dropout and is left as it was. Raises UserError without
    batches or without a loss, ModelError for gradients that are not finite.
    """
    parameters = {name: model.get_parameter(name) for name in names}
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    training, device = model.training, next(model.parameters()).device
    squares: dict[str, Tensor] = {}

    def add(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            squares[name] = parameter.grad.float().square_()
            parameter.grad = None
            if ranks.count == 1:
                sums[name].add_(squares.pop(name))

        return hook

    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    handles = [p.requires_grad_(True).register_post_accumulate_grad_hook(add(name)) for name, p in parameters.items()]
    seen = 0
    try:
        model.eval()
        for parts in track(rounds(batches, ranks), "sensitivity"):
            for batch in parts[ranks.index : ranks.index + 1]:
                loss: Any = loss_fn(model, {k: v.to(device) for k, v in batch.items()})
                if loss is None:
                    raise UserError("sensitivity needs a loss: the calibration batches have no labels")
                loss.backward()
            seen += len(parts)
            if ranks.count > 1:
                _add_in_order(sums, squares, len(parts), ranks)
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        model.train(training)
    if not seen:
        raise UserError("sensitivity needs calibration data: data.calibration gave no batch")
    for name, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise ModelError(f"{name}: squared gradients on the calibration data are not finite; check the data")
    return sums


@torch.no_grad()
def _add_in_order(sums: dict[str, Tensor], squares: dict[str, Tensor], batches: int, ranks: Ranks) -> None:
    """Add the squares of a round's batches, one weight at a time; those of this rank are used up."""
    for name, total in sums.items():
        for rank in range(batches):
            part = torch.zeros_like(total)  # what a weight without a gradient adds
            if rank == ranks.index and name in squares:
                part = squares.pop(name).contiguous()
            total.add_(from_rank(rank, part))
