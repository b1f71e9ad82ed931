"""A causal LM with a key-value cache in its states as a function of batches of texts.

Every row starts anew, at position 0, and goes in piece by piece, as an app would generate: what the cache holds
decides all logits after the first piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mptrain.errors import UserError

PIECE = 16  # tokens of a call, where the model takes as many


class Stateful(Protocol):
    def reset(self) -> None: ...

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]: ...


class Texts:
    """runner: takes input_ids [1, 1..tokens] and position [1], gives logits [1, n, vocabulary], holds the cache.

    max_length: tokens that the cache holds.
    """

    def __init__(self, runner: Stateful, *, tokens: int, max_length: int) -> None:
        self.runner = runner
        self.piece = min(tokens, PIECE)
        self.max_length = max_length

    def __call__(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
        """input_ids [batch, length], attention_mask to {"logits"}, zero where the mask leaves a token out."""
        ids = torch.as_tensor(batch["input_ids"])
        mask = torch.as_tensor(batch.get("attention_mask", torch.ones_like(ids))).bool()
        longest = int(mask.sum(1).max())
        if longest > self.max_length:
            raise UserError(
                f"a text of {longest} tokens does not fit the export's cache of {self.max_length}: raise `cache`, or"
                " make the texts shorter"
            )
        rows = [self._row(row[kept]) for row, kept in zip(ids, mask)]
        found = np.zeros((*ids.shape, rows[0].shape[-1]), rows[0].dtype)
        for row, kept, logits in zip(found, mask.numpy(), rows):
            row[kept] = logits
        return {"logits": found}

    def _row(self, ids: Tensor) -> np.ndarray:
        self.runner.reset()
        parts = []
        for start in range(0, len(ids), self.piece):
            call = {"input_ids": ids[None, start : start + self.piece], "position": torch.tensor([start])}
            parts.append(self.runner(call)["logits"][0])
        return np.concatenate(parts)
