"""Least-squares refit of what is kept, so that a layer's output changes least (Kwon et al. 2022, §4.3).

For an output projection (o or fc_out) with inputs X of the dense model, kept columns K:

    min over W'  ‖X Wᵀ - X_K W'ᵀ‖² + λ ‖W' - W_K‖²   →   W' = (W G[:,K] + λ W_K) (G[K,K] + λ I)⁻¹,  G = XᵀX

G is taken about the mean of X when the Linear has a bias, which then takes up the rest. The
sums and the solve are float64; λ is `RIDGE` of the mean diagonal of G[K,K]. The result is
folded into the weights: nothing is added to the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.compress.structure.blocks import Kept, Structure
from mptrain.compress.structure.shrink import linear_slices

RIDGE = 1e-3


@torch.no_grad()
def refit(model: nn.Module, structure: Structure, kept: Kept, batches: Iterable[dict[str, Tensor]]) -> None:
    """Refit the kept columns of the dense `model` in place, before it is shrunk to `kept`.

    batches: model inputs; labels may be among them. Padding tokens count like others.
    """
    slices = linear_slices(structure, kept)
    names = [name for _, b in structure.blocks() if (name := b.output) in slices and slices[name].cols is not None]
    moments = {name: _Moments() for name in names}
    handles = [model.get_submodule(name).register_forward_pre_hook(_reader(moments[name])) for name in names]
    training = model.training
    try:
        model.eval()
        device = next(model.parameters()).device
        for batch in batches:
            model(**{k: v.to(device) for k, v in batch.items()})
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    for name in names:
        _solve(model.get_submodule(name), moments[name], slices[name].cols)


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


def _solve(linear: nn.Module, moments: _Moments, cols: Tensor | None) -> None:
    assert isinstance(linear, nn.Linear) and cols is not None
    weight = linear.weight.double()
    cols = cols.to(weight.device)
    gram = torch.as_tensor(moments.squares) / moments.count
    mean = torch.as_tensor(moments.total) / moments.count
    if linear.bias is not None:
        gram = gram - torch.outer(mean, mean)
    inner = gram[cols][:, cols]
    ridge = RIDGE * float(inner.diagonal().mean())
    if not ridge > 0.0:  # inputs that are all zero or never change: nothing to learn from them
        return
    inner.diagonal().add_(ridge)
    old = weight[:, cols]
    new = torch.linalg.solve(inner, (weight @ gram[:, cols] + ridge * old), left=False)
    if linear.bias is not None:
        linear.bias.add_((weight @ mean - new @ mean[cols]).to(linear.bias.dtype))
    linear.weight[:, cols] = new.to(linear.weight.dtype)
