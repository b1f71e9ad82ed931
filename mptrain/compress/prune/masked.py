"""Masks that act in place on the weights.

During forward and backward a parameter holds W ⊙ M and the dense W is kept aside, so
nothing is added to the graph: fake quantizers, DDP, torch.compile, gradient checkpointing
and every attention implementation see an ordinary parameter. One optimizer step is

    forward, backward     p = W ⊙ M, p.grad = dL/d(W ⊙ M)
    gradients_ready()     the method reads p.grad and W; then p.grad ← p.grad ⊙ M, p ← W
    optimizer step        on the dense W, as autograd through W ⊙ M would have it
    updated(masks)        W ← p, then p ← W ⊙ M with the next masks

A parameter that is frozen or got no gradient is masked like any other.

With fp32 masters (`follow`) the optimizer updates those, W is read from them, and p = half(W ⊙ M)
is only what forward and backward see.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mptrain.compress.base import MasterView


class MaskedWeights:
    """Owns the dense values of some parameters of a model.

    parameters: by name. Masks are bool tensors that broadcast to their parameter, e.g.
    [1, in] for columns; a parameter without a mask is left as it is.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.masks: dict[str, Tensor] = {}
        self._masters: MasterView | None = None
        self.dense = {name: self._read(name).clone() for name in self.parameters}
        self._masked = True  # parameters hold W ⊙ M (here M is all ones)

    # The only places that touch the values and gradients of parameters.

    def _read(self, name: str) -> Tensor:
        parameter = self.parameters[name]
        return parameter.detach() if self._masters is None else self._masters.master(parameter)

    def _write(self, name: str, values: Tensor) -> None:
        self.parameters[name].detach().copy_(values)

    def gradient(self, name: str) -> Tensor | None:
        """dL/d(W ⊙ M), or None when the parameter got none."""
        parameter = self.parameters[name]
        return parameter.grad if self._masters is None else self._masters.gradient(parameter)

    def product(self, name: str) -> Tensor | None:
        """dL/d(W ⊙ M) · W by element, float32; None when the parameter got no gradient."""
        gradient = self.gradient(name)
        return None if gradient is None else gradient.float() * self.dense[name].float()

    @torch.no_grad()
    def follow(self, masters: MasterView | None) -> None:
        """From now on W is in masters that were built while the parameters held W ⊙ M; None: in the parameters."""
        self._masters = masters
        if masters is not None:
            for name, parameter in self.parameters.items():
                masters.master(parameter).copy_(self.dense[name])
        self.apply(self.masks)

    @torch.no_grad()
    def gradients_ready(self) -> None:
        """Mask the gradients and put the dense weights back for the optimizer step."""
        if not self._masked:
            raise RuntimeError("gradients_ready() twice in a step: call updated() after the optimizer step")
        for name, mask in self.masks.items():
            gradient = self.gradient(name)
            if gradient is not None:
                gradient.mul_(mask)
            self._write(name, self.dense[name])
        self._masked = False

    @torch.no_grad()
    def take_update(self) -> None:
        """W ← p after an optimizer step (also one that was skipped)."""
        if self._masked:
            raise RuntimeError("updated() without gradients_ready(): the optimizer stepped on masked weights")
        for name, dense in self.dense.items():
            dense.copy_(self._read(name))

    @torch.no_grad()
    def apply(self, masks: Mapping[str, Tensor]) -> None:
        """p ← W ⊙ M with new masks."""
        for name in self.parameters:
            if name in masks:
                self._write(name, self.dense[name] * masks[name])
            elif name in self.masks and self._masked:
                self._write(name, self.dense[name])
        self.masks = dict(masks)
        self._masked = True

    def restore(self) -> None:
        """p ← W; masks are gone."""
        self.apply({})

    def load_dense(self, dense: Mapping[str, Tensor]) -> None:
        for name, values in self.dense.items():
            values.copy_(dense[name])
