"""What a training-time compressor is.

A phase is one optimizer, one DDP wrap, one checkpoint series. A compressor never changes
the identity of a parameter inside a phase; at the boundary after it, `finalize` may.

    prepare(model)            once, when the phase starts (also before a resume)
    loop:  forward, backward
           gradients_ready()  gradients are averaged over ranks and micro-steps, not yet clipped
           optimizer step
           updated(step)      `step` optimizer steps are done now
    finalize(model)           the boundary: returns the model for the next phase

`at(step)` is pure: it tells the settings for a step without touching state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from mptrain.precision import MasterWeights


class Compressor(Protocol):
    """A method that acts on a model while it trains. Tensors in states are detached CPU copies."""

    @property
    def name(self) -> str:
        """Names its file in a checkpoint."""
        ...

    def prepare(self, model: nn.Module) -> nn.Module:
        """Attach to the model of this phase and return the model to train."""
        ...

    def at(self, step: int) -> Mapping[str, float]:
        """Settings that rule the forward pass after `step` optimizer steps; pure."""
        ...

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Extra optimizer groups, e.g. scores with their own lr. Not parameters of the model."""
        ...

    def gradients_ready(self) -> None: ...

    def gradients_unusable(self) -> None:
        """Instead of `gradients_ready` when a half gradient overflowed: the optimizer step is skipped."""
        ...

    def follow(self, masters: MasterWeights | None) -> None:
        """The model's weights are half copies of these masters from now on; None: they are fp32 again."""
        ...

    def updated(self, step: int) -> None: ...

    def finalize(self, model: nn.Module) -> nn.Module: ...

    def logs(self) -> dict[str, float]:
        """Scalars for the training log, e.g. {"compress/sparsity": 0.41}."""
        ...

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything `at` does not determine; flat names, tensors only."""
        ...

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None: ...
