"""A causal language model that keeps its key-value cache in buffers, for runtimes with states.

    call   input_ids [1, n], position [1]: the place of the first of these tokens in the text
    cache  buffers key_<layer> and value_<layer>, [1, key-value heads, max_length, head size]; the call writes the
           places position … position + n - 1 and attends to all up to each token's own
    gives  logits [1, n, vocabulary]

Places that nothing has been written to are masked, so a new text needs no more than position 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from mptrain.errors import UserError


class CachedDecoder(nn.Module):
    """model: a causal LM, float32. max_length: tokens that the cache holds.

    The buffers named in `states` are what a call changes. Raises UserError when the model does not fit.
    """

    seen: Tensor

    def __init__(self, model: nn.Module, max_length: int) -> None:
        super().__init__()
        if not isinstance(model, PreTrainedModel) or model.dtype != torch.float32 or not model.can_generate():
            dtype = getattr(model, "dtype", "unknown dtype")
            raise UserError(
                f"an export with a cache needs a plain float32 causal LM, got {type(model).__name__} of {dtype}"
            )
        limit = getattr(model.config, "max_position_embeddings", max_length)
        if not 1 <= max_length <= limit:
            raise UserError(f"an export with a cache: max_length {max_length} must be 1 to {limit}, the model's limit")
        self.model = model
        config = model.config.get_text_config()
        self.cache = StaticCache(config=config, max_cache_len=max_length)
        for layer, (keys, values) in zip(self.cache.layers, _first(model), strict=True):
            layer.lazy_initialization(keys, values)
        self.register_buffer("seen", torch.ones(1, max_length, dtype=torch.long))  # the causal mask does the rest
        self.states: list[str] = []
        self.layers: list[Any] = list(self.cache.layers)
        for index, layer in enumerate(self.layers):
            for kind, value in (("key", layer.keys), ("value", layer.values)):
                self.register_buffer(f"{kind}_{index}", value)
                self.states.append(f"{kind}_{index}")

    def forward(self, input_ids: Tensor, position: Tensor) -> tuple[Tensor]:
        for index, layer in enumerate(self.layers):
            # the export knows tensors of the module only, by their names here
            layer.keys, layer.values = getattr(self, f"key_{index}"), getattr(self, f"value_{index}")
            layer.cumulative_length = position.clone()
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=self.seen,
            position_ids=(position + torch.arange(input_ids.shape[1]))[None],
            past_key_values=self.cache,
            use_cache=True,
        )
        return (outputs.logits,)


@torch.no_grad()
def _first(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of one token, of every layer: pruned layers differ in their heads."""
    held = DynamicCache(config=model.config)
    model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=held, use_cache=True)
    found = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in held.layers]
    if not found or any(keys is None or values is None for keys, values in found):
        raise UserError(f"an export with a cache: {type(model).__name__} keeps other things than keys and values")
    return found  # type: ignore[return-value]


def texts(batch: Mapping[str, Tensor]) -> list[Tensor]:
    """The tokens [1, n] of each row that the attention mask does not leave out."""
    ids = torch.as_tensor(batch["input_ids"])
    mask = torch.as_tensor(batch.get("attention_mask", torch.ones_like(ids))).bool()
    return [row[kept][None] for row, kept in zip(ids, mask)]
