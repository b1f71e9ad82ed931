"""A model in memory that is for none of the tasks: named tensors in, named tensors out."""

from __future__ import annotations

import numpy as np

from mptrain.core.signature import MASK, Batch, Outputs
from mptrain.data.tasks import agreement
from mptrain.data.tasks.base import Task
from mptrain.recipe.task import NO_TASK


class NoTask(Task):
    """Never made of data; its class says when two models decide alike."""

    kind = NO_TASK

    @classmethod
    def agreement(cls, expected: Outputs, got: Outputs, batch: Batch) -> np.ndarray:
        """The class chosen by each row, of which those under a mask of the same sizes do not count."""
        mask = batch.get(MASK)
        per_token = mask is not None and all(
            value.ndim >= 3 and tuple(value.shape[:2]) == tuple(mask.shape) for value in expected.values()
        )
        return agreement.decisions(expected, got, batch if per_token else None)
