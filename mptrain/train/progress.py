"""How far a phase is: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from mptrain.recipe.plan import Phase

log = logging.getLogger(__name__)


class Progress(TrainerCallback):
    """A bar on a terminal; elsewhere (a log file) a line every half minute."""

    def __init__(self, phase: Phase) -> None:
        self.phase = phase
        self.label = f"{phase.stage}/{phase.name}"
        self.loss: float | None = None
        self.bar: Any = None
        self.begun = self.said = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        first = state.global_step
        hidden = not sys.stderr.isatty()
        self.bar = tqdm(total=state.max_steps, initial=first, desc=self.label, unit="step", disable=hidden)
        self.first = first

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(1)
        now = time.monotonic()
        if self.bar.disable and (now - self.said > 30 or state.global_step == state.max_steps):
            self.said = now
            each = (now - self.begun) / (state.global_step - self.first)
            left = each * (state.max_steps - state.global_step) / 60
            loss = "" if self.loss is None else f" loss {self.loss:.3f},"  # the first is logged after its step
            log.info(
                "%s: step %d of %d,%s %.2f s a step, %.1f min left",
                self.label, state.global_step, state.max_steps, loss, each, left,
            )  # fmt: skip

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.loss = logs["loss"]
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)
        scores = [f"{k.removeprefix('eval_')} {v:.4f}" for k, v in logs.items() if k.startswith("eval_")]
        if scores:
            step = self.phase.start + state.global_step
            line = f"{self.label}: step {step}, validation {', '.join(scores)}"
            log.info(line) if self.bar.disable else tqdm.write(line, file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
