"""`mptrain.inspect`: what can be cut out of a model in memory, and what half precision would do to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from mptrain.api.given import loaded, own_copy
from mptrain.api.shown import Shown
from mptrain.commands.inspect import check_precisions, inspect_loaded
from mptrain.precision import memory

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, repr=False)
class Inspection(Shown):
    """facts: JSON values, what `mptrain inspect --json` writes (`mptrain.inspect/v1`)."""

    facts: dict[str, Any]

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """What can be cut: name, kind, units, axes and integers of each; empty where nothing can."""
        return self.facts["structure"]["blocks"]

    @property
    def refused(self) -> list[dict[str, Any]]:
        """What cannot, {"what", "reason"}."""
        return self.facts["structure"]["refused"]

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of training with AdamW, by precision."""
        return {row["precision"]: row["total"] for row in self.facts["memory"]}

    @property
    def keep_fp32(self) -> dict[str, list[str] | None]:
        """By compute dtype what `precision.keep_fp32` has to name; None: no choice helps."""
        return {compute: row["keep_fp32"] for compute, row in self.facts["training"].items()}

    def _parts(self) -> Iterable[RenderableType]:
        from mptrain.report.render.inspect import inspection

        yield inspection(self.facts)


def inspect(
    model: nn.Module,
    batch: Any = None,
    *,
    task: str | None = None,
    precisions: Sequence[str] = tuple(memory.PRECISIONS),
    samples: int = 32,
    length: int = 128,
) -> Inspection:
    """What can be cut out of a model; its memory, overflow and speed in half precision. The model is left alone.

    model: of transformers, or any module that maps named tensors to named tensors. batch: inputs by name, an iterable
    of such batches or a data set; default for models of transformers: made up. task: default from the model's class.
    precisions: fp32, fp16-master, bf16-master, bf16-split, bf16-split-int8. samples: inputs to run on. length: tokens
    of a text that is made up.

    - Shapes and dtypes: tensors [batch, …] as the forward takes them; the model is looked at in float32, as a copy.
    - Units: bytes, parameters, milliseconds; fractions where a number is a share.
    - Raises UserError (ModelError, DataError) for a model, batch or precision that cannot be used.
    - Source: what `mptrain inspect` runs.
    """
    check_precisions(precisions)
    found = loaded(own_copy(model), batch, where="batch", task=task, count=samples, length=length)
    return Inspection(inspect_loaded(found, precisions, type(model).__name__))
