"""Magnitude pruning, the baseline: a unit is worth the energy of its weights.

    importance of a head     Σ w² over its rows of q, k, v and its columns of o
    importance of a channel  Σ w² over its rows of fc_in and its column of fc_out

(the squared L2 norm, because squares add up to what is kept of the layer). Units are
chosen under the budget at once, or gradually during a warm-up from the weights as they
train (Zhu and Gupta 2017).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from mptrain.compress.prune.base import Pruner, as_numpy, unit_sums
from mptrain.compress.structure.blocks import Attention
from mptrain.compress.structure.budget import Importance


class MagnitudePruner(Pruner):
    name = "magnitude"

    def prepare(self, model: nn.Module) -> nn.Module:
        self._inputs = {
            name: model.get_parameter(f"{name}.weight")
            for _, block in self.structure.prunable()
            for name in block.linears
            if name != block.output
        }
        return super().prepare(model)

    @torch.no_grad()
    def importance(self) -> Importance:
        found: dict[str, dict[int, np.ndarray]] = {"heads": {}, "ffn": {}}
        for kind, block in self.structure.prunable():
            output = self.masked.dense[f"{block.output}.weight"]
            total = unit_sums(block, output.double().square().sum(0))
            inputs = (block.q, block.k, block.v) if isinstance(block, Attention) else block.fc_in
            for name in inputs:
                rows = self._inputs[name].double().square().sum(1)
                total += rows.view(block.units, -1).sum(1).to(total.device)
            found[kind][block.index] = as_numpy(total)
        return found
