"""What the loss does not depend on: parameters that train and get no gradient."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback

log = logging.getLogger(__name__)
SHARE = 0.05
"""of the parameters that train: a pooler that a task does not read is less, and nothing is said of it"""


class Untouched(TrainerCallback):
    """Says so once, at the first step: a part whose only reader was dropped would stand still for all of training."""

    def __init__(self, label: str) -> None:
        self.label, self.seen = label, False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.seen:
            return
        self.seen = True
        model: nn.Module = kwargs["model"]
        training = {name: p for name, p in model.named_parameters() if p.requires_grad}
        idle = {name: p.numel() for name, p in training.items() if p.grad is None}
        share = sum(idle.values()) / max(1, sum(p.numel() for p in training.values()))
        if SHARE <= share < 1.0 and state.is_world_process_zero:  # none at all: the optimizer took them in backward
            log.warning(
                "%s: %.0f%% of the parameters that train got no gradient in the first step (%d tensors, %s first):"
                " the loss does not depend on them there, and they stay as they are",
                self.label,
                100 * share,
                len(idle),
                next(iter(idle)),
            )
