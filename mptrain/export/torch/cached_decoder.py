"""A causal language model that keeps its key-value cache in buffers, for runtimes with states.

    call   input_ids [1, n], position [1]: the place of the first of these tokens in the text
    cache  buffers key_<layer> and value_<layer>, [1, key-value heads, max_length, head size]; the call writes the
           places position … position + n - 1 and attends to all up to each token's own
    gives  logits [1, n, vocabulary]

Places that nothing has been written to are masked, so a new text needs no more than position 0. All layers keep all
places, also those that attend to a window: their mask leaves the others out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from mptrain.core.errors import UserError
from mptrain.core.signature import BATCH, Port, Signature, without_cache
from mptrain.export.torch.texts import unmasked
from mptrain.recipe import Recipe

CALL = Signature(
    (Port("input_ids", (BATCH, "tokens"), "int64"), Port("position", (BATCH,), "int64")),
    (Port("logits", (BATCH, "tokens", "vocabulary")),),
)
"""of a call"""
CHECKED = 8  # tokens on which a cached model is compared with the model itself


class CachedDecoder(nn.Module):
    """model: a causal LM, float32. max_length: tokens that the cache holds.

    The buffers named in `states` are what a call changes. Raises UserError when the model does not fit, also when it
    gives other logits with such a cache than without one.
    """

    seen: Tensor

    def __init__(self, model: nn.Module, max_length: int) -> None:
        super().__init__()
        decoder, held = check_decoder(model)
        check_length("an export with a cache: max_length", max_length, decoder.config)
        self.model = decoder
        self.cache = StaticCache(config=decoder.config.get_text_config(), max_cache_len=max_length)
        self.cache.layers = [StaticLayer(max_cache_len=max_length) for _ in held]
        for layer, (keys, values) in zip(self.cache.layers, held):
            layer.lazy_initialization(keys, values)
        self.register_buffer("seen", torch.ones(1, max_length, dtype=torch.long))  # the causal mask does the rest
        self.states: list[str] = []
        self.layers: list[Any] = list(self.cache.layers)
        for index, layer in enumerate(self.layers):
            for kind, value in (("key", layer.keys), ("value", layer.values)):
                self.register_buffer(f"{kind}_{index}", value)
                self.states.append(f"{kind}_{index}")
        self._check(min(max_length, CHECKED))

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
    def _check(self, length: int) -> None:
        training = self.model.training
        self.model.eval()
        ids = torch.arange(length)[None] % self.model.config.get_text_config().vocab_size
        with without_cache(self.model):
            expected = self.model(input_ids=ids).logits
        pieces = [(place, ids[:, place : place + 3]) for place in range(0, length, 3)]
        found = torch.cat([self(piece, torch.tensor([place]))[0] for place, piece in pieces], 1)
        for name in self.states:
            getattr(self, name).zero_()
        self.model.train(training)
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise UserError(
                f"an export with a cache: {type(self.model).__name__} gives other logits with a cache of a fixed"
                f" length than without, by up to {(found - expected).abs().max():.2g}; export it without"
            )


@torch.no_grad()
def check_decoder(model: nn.Module) -> tuple[PreTrainedModel, list[tuple[Tensor, Tensor]]]:
    """The model, and keys and values [1, heads, 1, size] of one token, of every layer: pruned ones differ in heads.

    Raises UserError when it is no causal LM in float32, or keeps other things than keys and values.
    """
    if not isinstance(model, PreTrainedModel) or model.dtype != torch.float32 or not model.can_generate():
        dtype = getattr(model, "dtype", "unknown dtype")
        raise UserError(
            f"an export with a cache needs a plain float32 causal LM, got {type(model).__name__} of {dtype}"
        )
    held = DynamicCache(config=model.config)
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=held, use_cache=True)
    except Exception as error:  # hybrids keep states of another kind
        raise UserError(
            f"an export with a cache: {type(model).__name__} does not run with a cache of keys and values ({error});"
            " export it without"
        ) from error
    found = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in held.layers]
    if not found or any(keys is None or values is None for keys, values in found):
        raise UserError(
            f"an export with a cache: {type(model).__name__} keeps other things than keys and values; export it without"
        )
    return model, found  # type: ignore[return-value]


def check_length(field: str, tokens: int, config: PreTrainedConfig) -> None:
    """Raises UserError when models of this config cannot have a cache of so many tokens."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    limit = positions if positions > 0 else max(tokens, 1)
    if not 1 <= tokens <= limit:
        raise UserError(f"{field} {tokens} must be 1 to {limit}, the model's limit; lower it")


def check_exports(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Raises UserError for a `cache` that the recipe's model is too short for, before anything is trained."""
    for export in recipe.export:
        if export.cache is not None:
            check_length(f"export.{export.id}.cache:", export.cache, config)


def texts(batch: Mapping[str, Tensor]) -> list[Tensor]:
    """The tokens [1, n] of each row that the attention mask does not leave out."""
    return [row[kept][None] for row, kept in zip(*unmasked(batch))]


def padded_right(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with each row's padding moved behind its text. A cached model counts positions from the text's first
    token; without one, some models (GPT-2) count them from the row's."""
    if "attention_mask" not in batch:
        return dict(batch)
    order = batch["attention_mask"].argsort(dim=1, descending=True, stable=True)
    return {name: value.gather(1, order) for name, value in batch.items()}
