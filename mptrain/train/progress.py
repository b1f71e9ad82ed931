"""How far a phase is: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from mptrain.core.progress import progress
from mptrain.recipe.plan import Phase

log = logging.getLogger(__name__)


class TrainingProgress(TrainerCallback):
    """Steps, loss, time left; a line of its own for every score on validation."""

    def __init__(self, phase: Phase) -> None:
        self.phase = phase
        self.label = f"{phase.stage}/{phase.name}"
        self.open = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        running = progress(self.label, state.max_steps, done=state.global_step, unit="step")
        self.progress = self.open.enter_context(running)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(state.global_step - self.progress.done)
        if state.global_step == state.max_steps and self.progress.bar is None:
            log.info(self.progress.line())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.progress.say(f"loss {logs['loss']:.3f}")
        scores = [f"{k.removeprefix('eval_')} {v:.4f}" for k, v in logs.items() if k.startswith("eval_")]
        if scores:
            step = self.phase.start + state.global_step
            line = f"{self.label}: step {step}, validation {', '.join(scores)}"
            log.info(line) if self.progress.bar is None else tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """When the training ended, or failed."""
        self.open.close()
