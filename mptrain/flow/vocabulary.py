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
    found = torch.zeros(_places(data.processor), dtype=torch.int64)
    examples = data.taught(distilled=True)
    for start in track(range(0, len(examples), _BATCH), "counting tokens"):
        batch = data.collate([examples[i] for i in range(start, min(start + _BATCH, len(examples)))])
        for name in TOKENS:
            if name in batch:
                found += torch.bincount(batch[name].flatten(), minlength=len(found))
    return found


def _places(tokenizer: Any) -> int:
    """Ids may leave some out."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def ids_in(tokenizer: Any, other: Any) -> Tensor:
    """int64 [tokens]: the id that each token of a tokenizer has in another. Raises UserError for one that it lacks."""
    theirs = other.get_vocab()
    found = torch.zeros(_places(tokenizer), dtype=torch.int64)
    for token, number in tokenizer.get_vocab().items():
        if token not in theirs:
            raise UserError(f"teacher: its tokenizer has no token {token!r}, which the student's has; choose another")
        found[number] = theirs[token]
    return found


def changed(before: Task, after: Task, split: str) -> float:
    """The share of the inputs of a split that have other tokens than before. An input may be several examples, and
    more of them than before."""
    ids = ids_in(after.processor, before.processor)
    old, new = _examples(before, split), _examples(after, split)
    others = 0
    for row, indices in old.items():
        was, now = _tokens(before, split, indices), _tokens(after, split, new.get(row, []))
        others += len(was) != len(now) or any(a.shape != b.shape or bool((a != ids[b]).any()) for a, b in zip(was, now))
    return others / max(1, len(old))


def _examples(data: Task, split: str) -> dict[int, list[int]]:
    """Of each row of a split, the places of its examples."""
    found: dict[int, list[int]] = {}
    for i in range(len(getattr(data, split))):
        found.setdefault(data.row_of(split, i), []).append(i)
    return found


def _tokens(data: Task, split: str, indices: list[int]) -> list[Tensor]:
    batches = (data.collate([getattr(data, split)[i]]) for i in indices)
    return [batch[name] for batch in batches for name in TOKENS if name in batch]
