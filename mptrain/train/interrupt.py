"""When a phase writes a checkpoint, and how it stops in the middle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from mptrain.train.peaks import Peaks


class Stopped(Exception):
    """The user asked to stop; a checkpoint was written."""


class Checkpoints(TrainerCallback):
    """A checkpoint every so many steps and when the user stops; none at the end, which saves the model itself.

    At the last step of an epoch it waits for the evaluation: a run that continues begins the next epoch.
    """

    def __init__(self, every: int, stop: Callable[[], bool], begin: Callable[[], None], peaks: Peaks | None) -> None:
        self.every, self.stop, self.begin, self.peaks = every, stop, begin, peaks
        self.stopped = self.due = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            return
        self.stopped = self.stop()
        self.due = self.stopped or state.global_step % self.every == 0
        if state.epoch != int(state.epoch):
            self._save(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._save(control)

    def _save(self, control: Any) -> None:
        if self.due:
            self.due, control.should_save = False, True
            if self.peaks is not None:
                self.peaks.save()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped:
            raise Stopped
