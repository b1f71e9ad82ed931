"""Masters in a Trainer: how MasterWeights takes the place of a gradient scaler in Accelerate.

Accelerate asks its `scaler` to scale the loss, and hands it the optimizer to step. When the scaler does not
call the optimizer's `step`, the step counts as skipped, and the Trainer then holds the learning-rate schedule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mptrain.precision import MasterWeights, ShardedMasters
from mptrain.recipe import MixedPrecision


def build(model: nn.Module, optimizer: torch.optim.Optimizer, precision: MixedPrecision) -> MasterWeights:
    """Masters as the recipe's `precision` says; compute is not fp32."""
    assert precision.compute != "fp32"
    return MasterWeights(
        model,
        optimizer,
        precision.compute,
        precision.master,
        keep_fp32=precision.keep_fp32,
        loss_scale=precision.loss_scale,
        moments=precision.moments,
    )


class StepScaler:
    """What Accelerate takes for its `scaler`."""

    def __init__(self, masters: MasterWeights | ShardedMasters | None) -> None:
        """None: they are built once the model is sharded."""
        self.masters: Any = masters

    def is_enabled(self) -> bool:
        return True

    def get_scale(self) -> float:
        return self.masters.loss_scale

    def scale(self, loss: Tensor) -> Tensor:
        return self.masters.scale(loss)

    def step(self, optimizer: torch.optim.Optimizer, closure: Any = None) -> None:
        if isinstance(self.masters, ShardedMasters):  # which call the optimizer's
            self.masters.step()
        elif self.masters.finite():
            optimizer.step(closure)
        else:
            # not through `optimizer.step`, by which Accelerate knows that a step was taken
            type(self.masters).step(self.masters)

    def update(self) -> None:
        """Done in the step."""

    def state_dict(self) -> dict[str, Any]:
        """Empty: the loss scale is saved with the optimizer."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
