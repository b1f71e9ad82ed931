"""A transformers model as tracers need it: inputs by position, outputs as a tuple, masks from tensor operations.

Shared by every converter. Inside `traceable_masks` the lengths stay symbolic: transformers'
own mask functions take a traced length, a 0-d tensor, for positions, and forcing it to an
integer would silently bake the length of the example into the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from mptrain.core.patch import replaced
from mptrain.core.signature import Call, by_name, called


class Positional(nn.Module):
    """The model with inputs by position and its tensor outputs as a tuple. outputs: their names, default all. call:
    of its signature."""

    def __init__(
        self, model: nn.Module, inputs: Sequence[str], outputs: Sequence[str] | None = None, call: Call = called
    ) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs, self.call = model, list(inputs), outputs, call

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        found = by_name(self.call(self.model, dict(zip(self.inputs, values))))
        return tuple(found.values() if self.outputs is None else (found[name] for name in self.outputs))


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of its floating parameters; float32 for a model without any."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@contextmanager
def traceable_masks(masked: float = torch.finfo(torch.float16).min) -> Iterator[None]:
    """masked: what is added to the score of a key that a query may not see; finite in float16."""

    def never_packed(position_ids: Tensor) -> None:
        return None  # several texts in one row are for training; looking for them takes operations converters lack

    # Item assignment goes to a layer of the mapping above the registered functions; deletion uncovers them.
    for name in ("sdpa", "eager"):
        ALL_MASK_ATTENTION_FUNCTIONS[name] = partial(additive_mask, masked=masked)
    try:
        with replaced(masking_utils, find_packed_sequence_indices=never_packed):
            yield
    finally:
        for name in ("sdpa", "eager"):
            del ALL_MASK_ATTENTION_FUNCTIONS[name]


def additive_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: Any = "cpu",
    masked: float = torch.finfo(torch.float16).min,
    **_: Any,
) -> Tensor:
    """0 where a query may see a key, else `masked`, [batch, 1, q_length, kv_length].

    attention_mask: [batch, kv_length] or None. Finite, for runtimes make NaN of a row that sees
    nothing, as left padding has in a causal model, and NaN spreads to the rest; a float16, so
    that it is finite in every inference precision.
    """
    batch = torch.arange(batch_size, device=device)[:, None, None, None]
    head = torch.zeros(1, dtype=torch.long, device=device)[None, :, None, None]
    query = torch.arange(q_length, device=device)[None, None, :, None] + q_offset
    key = torch.arange(kv_length, device=device)[None, None, None, :] + kv_offset
    seen = mask_function(batch, head, query, key)
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None, :].to(torch.bool)
    seen = seen.expand(batch_size, -1, q_length, kv_length)
    return torch.where(seen, 0.0, masked)
