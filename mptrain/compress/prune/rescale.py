"""Least-squares refit of what is kept, so that a layer's output changes least (Kwon et al. 2022, §4.3).

For a sink (the Linear after the heads, fc_out) with inputs X of the dense model, kept columns K:

    min over W'  ‖X Wᵀ - X_K W'ᵀ‖² + λ ‖W' - W_K‖²   →   W' = (W G[:,K] + λ W_K) (G[K,K] + λ I)⁻¹,  G = XᵀX

G is taken about the mean of X when the Linear has a bias, which then takes up the rest. The
sums and the solve are float64; λ is `RIDGE` of the mean diagonal of G[K,K]. The result is
folded into the weights: nothing is added to the model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.compress.structure.blocks import Kept, Structure
from mptrain.compress.structure.consumers import Consumer, consumers
from mptrain.compress.structure.shrink import slices_of
from mptrain.core.progress import track

RIDGE = 1e-3

log = logging.getLogger(__name__)


@torch.no_grad()
def refit(model: nn.Module, structure: Structure, kept: Kept, batches: Iterable[dict[str, Tensor]]) -> None:
    """Refit the kept columns of the dense `model` in place, before it is shrunk to `kept`.

    batches: model inputs; labels may be among them. Padding tokens count like others.
    """
    slices = slices_of(structure, kept)
    found: dict[str, Consumer] = {}
    for block in structure:
        if kept.cuts(block):
            mine = consumers(model, block)
            found |= {consumer.module: consumer for consumer in mine}
            if len(mine) < len(block.sinks):
                log.warning("prune.rescale: what reads %s is not a Linear; it is left as it is", block.name)
    moments = {name: _Moments() for name in found}
    handles = [model.get_submodule(name).register_forward_pre_hook(_reader(moments[name])) for name in found]
    training = model.training
    try:
        model.eval()
        device = next(model.parameters()).device
        for batch in track(batches, "inputs of what is kept"):
            model(**{k: v.to(device) for k, v in batch.items()})
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    for name, consumer in found.items():
        if moments[name].count:
            columns = slices[consumer.axis.parameter][consumer.axis.dim]
            _solve(consumer.matrix(model), getattr(model.get_submodule(name), "bias", None), moments[name], columns)


class _Moments:
    """Running Σ xxᵀ and Σ x of the inputs of a Linear, float64."""

    count = 0
    squares: Tensor | float = 0.0
    total: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1]).double()
        self.squares = self.squares + flat.T @ flat
        self.total = self.total + flat.sum(0)
        self.count += len(flat)


def _reader(moments: _Moments) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        moments.add(inputs[0])

    return hook


def _solve(matrix: Tensor, bias: Tensor | None, moments: _Moments, cols: Tensor) -> None:
    """matrix: [out, in], written in place, as is the bias."""
    weight = matrix.double()
    cols = cols.to(weight.device)
    gram = torch.as_tensor(moments.squares) / moments.count
    mean = torch.as_tensor(moments.total) / moments.count
    if bias is not None:
        gram = gram - torch.outer(mean, mean)
    inner = gram[cols][:, cols]
    ridge = RIDGE * float(inner.diagonal().mean())
    if not ridge > 0.0:  # inputs that are all zero or never change: nothing to learn from them
        return
    inner.diagonal().add_(ridge)
    old = weight[:, cols]
    new = torch.linalg.solve(inner, (weight @ gram[:, cols] + ridge * old), left=False)
    if bias is not None:
        bias.add_((weight @ mean - new @ mean[cols]).to(bias.dtype))
    matrix[:, cols] = new.to(matrix.dtype)
