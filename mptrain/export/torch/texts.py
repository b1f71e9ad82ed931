"""A causal LM with a key-value cache in its states as a function of batches of texts.

Every row starts anew, at position 0, and goes in piece by piece, as an app would generate: what the cache holds
decides all logits after the first piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mptrain.core.errors import UserError

PIECE = 16  # tokens of a call, where the model takes as many


class Stateful(Protocol):
    def reset(self) -> None: ...

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]: ...


def unmasked(batch: Mapping[str, Tensor | np.ndarray]) -> tuple[Tensor, Tensor]:
    """(input_ids, where they count), both [batch, length]; all of them without an attention_mask."""
    ids = torch.as_tensor(batch["input_ids"])
    return ids, torch.as_tensor(batch.get("attention_mask", torch.ones_like(ids))).bool()


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
        ids, mask = unmasked(batch)
        longest = int(mask.sum(1).max())
        if longest > self.max_length:
            raise UserError(
                f"a text of {longest} tokens does not fit the export's cache of {self.max_length}: raise `cache`, or"
                " make the texts shorter"
            )
        if not longest:
            raise UserError("a batch of texts without a token: attention_mask leaves all out; drop the batch")
        rows = [self._row(row[kept]) if kept.any() else None for row, kept in zip(ids, mask)]
        first = next(logits for logits in rows if logits is not None)
        found = np.zeros((*ids.shape, first.shape[-1]), first.dtype)
        for row, kept, logits in zip(found, mask.numpy(), rows):
            if logits is not None:
                row[kept] = logits
        return {"logits": found}

    def calls(self, ids: Tensor) -> Iterator[dict[str, Tensor]]:
        """The inputs of each call for the text ids [n]."""
        for start in range(0, len(ids), self.piece):
            yield {"input_ids": ids[None, start : start + self.piece], "position": torch.tensor([start])}

    def _row(self, ids: Tensor) -> np.ndarray:
        self.runner.reset()
        return np.concatenate([self.runner(call)["logits"][0] for call in self.calls(ids)])
