"""The matrices that read a block's units: what methods ask that look at layer inputs and refit weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mptrain.compress.structure import fields
from mptrain.compress.structure.blocks import Axis, Block


@dataclass(frozen=True)
class Consumer:
    """A Linear (or transformers' Conv1D) with units of a block among its inputs: the write-back of attention or FFN.

    module: its name; its input is [..., in]. columns: int64 [units, n], which inputs each unit is.
    """

    module: str
    axis: Axis
    columns: Tensor

    def matrix(self, model: nn.Module) -> Tensor:
        """Its weight as [out, in], a view to read and write."""
        weight = model.get_parameter(self.axis.parameter)
        return weight if self.axis.dim == 1 else weight.T


def consumers(model: nn.Module, block: Block) -> list[Consumer]:
    """One for each sink; sinks of another kind (convolutions, experts) are left out."""
    found = []
    for axis in block.sinks:
        module, _, name = axis.parameter.rpartition(".")
        owner = model.get_submodule(module)
        linear = not isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and fields.input_dim(owner) == axis.dim
        if name == "weight" and linear:
            found.append(Consumer(module, axis, torch.from_numpy(axis.indices)))
    return found
