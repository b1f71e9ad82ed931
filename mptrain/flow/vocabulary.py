"""What a cut of the vocabulary makes of the texts: which tokens they have, and which texts have others than before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mptrain.core.errors import UserError
from mptrain.core.progress import track
from mptrain.core.signature import TOKENS
from mptrain.data.load import Task

_BATCH = 64


def counts(data: Task) -> Tensor:
    """int64 [tokens]: how often each stands in what is trained on, padding and special tokens among them."""
    found = torch.zeros(len(data.processor), dtype=torch.int64)
    examples = data.taught(distilled=True)
    for start in track(range(0, len(examples), _BATCH), "counting tokens"):
        batch = data.collate([examples[i] for i in range(start, min(start + _BATCH, len(examples)))])
        for name in TOKENS:
            if name in batch:
                found += torch.bincount(batch[name].flatten(), minlength=len(found))
    return found


def ids_in(tokenizer: Any, other: Any) -> Tensor:
    """int64 [tokens]: the id that each token of a tokenizer has in another. Raises UserError for one that it lacks."""
    theirs = other.get_vocab()
    found = torch.zeros(len(tokenizer), dtype=torch.int64)
    for token, number in tokenizer.get_vocab().items():
        if token not in theirs:
            raise UserError(f"teacher: its tokenizer has no token {token!r}, which the student's has; choose another")
        found[number] = theirs[token]
    return found


def changed(before: Task, after: Task, split: str) -> float:
    """The share of the inputs of a split that have other tokens than before."""
    old, new = getattr(before, split), getattr(after, split)
    ids = ids_in(after.processor, before.processor)
    others = 0
    for i in range(len(old)):
        was, now = before.collate([old[i]]), after.collate([new[i]])
        others += any(
            was[name].shape != now[name].shape or bool((was[name] != ids[now[name]]).any())
            for name in TOKENS
            if name in was
        )
    return others / max(1, len(old))
