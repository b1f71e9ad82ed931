"""After every step: the loss scale moves on, and when it is exhausted training ends with a diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from mptrain.core.errors import TrainingError
from mptrain.precision.diagnose import ActivationWatch, bad_gradients
from mptrain.precision.scaler import LossScaler


class Watchdog:
    """Watches the activations of the last forward pass before `scaler` is exhausted, and none before that.

    keep: how a user keeps layers in fp32, for the message.
    """

    def __init__(self, model: nn.Module, scaler: LossScaler, compute: str, keep: str) -> None:
        self.model, self.scaler, self.compute, self.keep = model, scaler, compute, keep
        self._watch: ActivationWatch | None = None

    def stepped(
        self,
        finite: bool,
        loss: Tensor | None,
        gradients: Callable[[], Iterable[tuple[str, Tensor | None]]],
        rank: int | None,
    ) -> None:
        """gradients: by name, scaled or not; rank: None for one process. Raises TrainingError."""
        self.scaler.update(finite)
        if self.scaler.exhausted:
            raise TrainingError(self._diagnosis(loss, gradients(), "" if rank is None else f" on rank {rank}"))
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        if self.scaler.last_chance:
            self._watch = ActivationWatch(self.model)

    def _diagnosis(self, loss: Tensor | None, gradients: Iterable[tuple[str, Tensor | None]], rank: str) -> str:
        last = f" The last loss was {float(loss):.4g}{rank}." if loss is not None else ""
        if self._watch is None:
            seen = "Activations were not watched (loss_scale.patience is 1)."
        else:
            seen = self._watch.describe()
            self._watch.remove()
        fix = (
            f"Check the data of this rank, lower the learning rate, or keep the named layers in fp32 ({self.keep});"
            " the masters are those of the last good step."
        )
        if self.compute == "fp16":
            fix = f"{fix[:-1]}; or compute in bf16, whose range is that of fp32."
        return (
            f"{self.scaler.overflows_at_floor} optimizer steps in a row were skipped{rank} with the loss scale at its"
            f" floor ({self.scaler.settings.floor:g}).{last} {bad_gradients(gradients)} {seen} {fix}"
        )
