"""Parameters that show values made of their dense weights, what the target will hold, while the dense weights train.

As masks do (prune/masked.py), but for any function of the weights: forward and backward see the shown values, the
optimizer updates the dense ones with the gradients of the shown (straight through), and they are shown anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mptrain.compress.prune.masked import MaskedWeights


class ShownWeights(MaskedWeights):
    """parameters: by name. of: the values to show for a name, of as many elements as its parameter."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], of: Callable[[str], Tensor]) -> None:
        super().__init__(parameters)
        self._of = of

    @torch.no_grad()
    def gradients_ready(self) -> None:
        for name, dense in self.dense.items():
            self._write(name, dense)
        self._masked = False

    @torch.no_grad()
    def apply(self, masks: Mapping[str, Tensor]) -> None:
        """Show the values as they are now; there are no masks."""
        for name in self.parameters:
            self._write(name, self._of(name).view_as(self.dense[name]))
        self._masked = True

    def show(self) -> None:
        self.apply({})

    @torch.no_grad()
    def trained(self, name: str) -> Tensor:
        """What the optimizer updates, to be changed in place between its step and `take_update`."""
        return self._read(name)
