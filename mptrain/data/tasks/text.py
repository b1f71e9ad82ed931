"""Tokenization and padding, the same for every task that reads text."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mptrain.core.errors import DataError
from mptrain.data.sources.quoting import shown
from mptrain.data.sources.tables import Table, check_unicode
from mptrain.data.tasks.arrays import stack
from mptrain.data.tasks.base import IGNORED, Batch, Example

_PADDING = {"attention_mask": 0, "special_tokens_mask": 1, "labels": IGNORED}


def texts_of(table: Table, field: str) -> list[str]:
    """A text column. Raises DataError naming the first row that is not text, or not Unicode."""
    for row, value in enumerate(table[field]):
        if not isinstance(value, str):
            raise DataError(
                f"{table.place(field, row)} holds {shown(value)} where text is needed. Correct the row,"
                f" or set data.{field} to the column with the text."
            )
        check_unicode(value, table.place(field, row))
    return table[field]


def tokenize(tokenizer: Any, *texts: Any, **options: Any) -> Any:
    """tokenizer(*texts) with attention mask and without the remark that a text is long."""
    with _no_remarks():
        return tokenizer(*texts, return_attention_mask=True, **options)


def examples_of(encoding: Any, tokenizer: Any) -> list[Example]:
    """One dict per sequence, of int32 arrays under the tokenizer's input names."""
    names = [name for name in tokenizer.model_input_names if name in encoding]
    columns = [[np.asarray(ids, dtype=np.int32) for ids in encoding[name]] for name in names]
    return [dict(zip(names, row)) for row in zip(*columns)]


def pad(
    examples: Sequence[Example], tokenizer: Any, length: int | None = None, side: Literal["left", "right"] | None = None
) -> Batch:
    """int64 tensors [b, s], padded as the tokenizer pads; scalar entries (class indices) become [b].

    A model may read the class at the last place, or give padding a segment of its own (XLNet), so both follow the
    tokenizer. length: cut or pad to it; the longest by default. side: instead of the tokenizer's. Raises DataError
    for a length the model cannot read.
    """
    if length is not None:
        check_length(tokenizer, length, "evaluate.latency.length")
    fills = _PADDING | {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    left = (side or tokenizer.padding_side) == "left"
    batch: dict[str, Tensor] = {}
    for name, first in examples[0].items():
        if np.ndim(first) == 0:
            batch[name] = torch.tensor([e[name] for e in examples])
        elif left:  # the other way round, from the end on
            backwards = stack([e[name][::-1] for e in examples], fills[name], length).long()
            batch[name] = backwards.flip(1)
        else:
            batch[name] = stack([e[name] for e in examples], fills[name], length).long()
    return batch


def check_length(tokenizer: Any, length: int, field: str = "data.max_length") -> None:
    """Raise DataError when the model cannot read that many tokens."""
    if length > tokenizer.model_max_length:
        raise DataError(
            f"{field}: {length} is more than the {tokenizer.model_max_length} tokens this model can read; lower it."
        )


@contextmanager
def _no_remarks() -> Iterator[None]:
    logger = logging.getLogger("transformers.tokenization_utils_base")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
