"""The loss scale: gradients of fp16 underflow below 2^-24, so the loss is multiplied before backward.

    good step       growth tracker + 1; at `interval` the scale grows, up to the ceiling
    overflow        the step is skipped; the tracker is cleared, one of `hysteresis` chances is used;
                    when none is left the scale backs off, down to the floor and never to 0

All of it is host arithmetic on the one bit "were all gradients finite", which the ranks agree on
first. bf16 and a static scale run the same machine with floor = ceiling, so their non-finite steps
are skipped and counted as well, and repeated ones end the run with a diagnosis instead of NaN weights.
"""

from __future__ import annotations

from typing import Any

from mptrain.precision.policy import LossScale

STATE = ("scale", "good_steps", "chances", "overflows_at_floor", "skipped_steps")


class LossScaler:
    """State of the loss scale. `update` once for each optimizer step, taken or skipped."""

    def __init__(self, settings: LossScale) -> None:
        self.settings = settings
        self.scale = float(settings.init)
        self.ceiling = settings.ceiling
        self.good_steps = 0
        self.chances = settings.hysteresis
        self.overflows_at_floor = 0
        self.skipped_steps = 0
        """over the whole run"""

    def update(self, finite: bool) -> None:
        s = self.settings
        if finite:
            self.overflows_at_floor = 0
            self.good_steps += 1
            if s.interval is not None and self.good_steps >= s.interval:
                self.good_steps = 0
                self.chances = s.hysteresis
                self.scale = min(self.scale * s.growth, self.ceiling)
            return
        self.skipped_steps += 1
        self.good_steps = 0
        if self.scale <= s.floor:
            self.overflows_at_floor += 1
        self.chances = max(self.chances - 1, 0)
        if self.chances == 0:
            self.scale = max(self.scale * s.backoff, s.floor)

    def limit(self, ceiling: float) -> None:
        """Lower the ceiling of a dynamic scale."""
        if self.settings.interval is not None and self.settings.floor <= ceiling < self.ceiling:
            self.ceiling = ceiling
            self.scale = min(self.scale, ceiling)

    @property
    def last_chance(self) -> bool:
        """One more overflow exhausts the scale: the next forward pass is worth watching."""
        return self.overflows_at_floor == self.settings.patience - 1

    @property
    def exhausted(self) -> bool:
        return self.overflows_at_floor >= self.settings.patience

    def logs(self, grad_norm: float) -> dict[str, float]:
        """Scalars for the training log. grad_norm: unscaled, before clipping."""
        return {
            "precision/loss_scale": self.scale,
            "precision/skipped_steps": float(self.skipped_steps),
            "precision/grad_norm": grad_norm,
        }

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in STATE:
            setattr(self, name, type(getattr(self, name))(state[name]))
