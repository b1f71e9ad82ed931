"""Magnitude pruning, the baseline: a unit is worth the energy of its weights.

    importance of a head     Σ w² over its rows of q, k, v and its columns of o
    importance of a channel  Σ w² over its rows of fc_in and its column of fc_out

(the squared L2 norm over sources and sinks, because squares add up to what is kept of the
layer). Units are chosen under the budget at once, or gradually during a warm-up from the
weights as they train (Zhu and Gupta 2017).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mptrain.compress.prune.base import Pruner, as_numpy, unit_sums
from mptrain.compress.structure.budget import Importance


class MagnitudePruner(Pruner):
    name = "magnitude"

    def prepare(self, model: nn.Module) -> nn.Module:
        axes = [axis for block in self.structure.prunable() for axis in block.sources]
        self._inputs = {axis.parameter: model.get_parameter(axis.parameter) for axis in axes}
        return super().prepare(model)

    @torch.no_grad()
    def importance(self) -> Importance:
        found = {}
        for block in self.structure.prunable():
            total = torch.zeros(block.units, dtype=torch.float64)
            for axis in (*block.sinks, *block.sources):
                total += unit_sums(axis, self._weight(axis.parameter).double().square()).to(total.device)
            found[block.name] = as_numpy(total)
        return found

    def _weight(self, name: str) -> Tensor:
        """Without masks."""
        return self.masked.dense[name] if name in self.masked.dense else self._inputs[name]
