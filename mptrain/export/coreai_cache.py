"""Causal language models as Core AI assets that keep their key-value cache between calls.

One call takes one token and its position, writes its keys and values into the states `key_<layer>` and
`value_<layer>`, [1, key-value heads, max_length, head size], and gives the logits of the next token. Core AI changes
a state at places that the data says only where the number of places is fixed, so a prompt goes in token by token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from mptrain.compress import records
from mptrain.compress.base import is_quantized
from mptrain.errors import ExportError, UserError
from mptrain.export.coreai import MASKED, Exported, converted, quiet, write
from mptrain.export.coreai_weights import stored
from mptrain.export.traceable import traceable_masks


def export_decoder(model: PreTrainedModel, folder: Path, *, max_length: int, processor: Any = None) -> Exported:
    """Write folder/ with model.aimodel, config.json and the processor's files; fp32.

    model: a causal LM without quantizers, float32; weights with records are stored as such. It is not changed.
    max_length: tokens that the cache holds. The asset has the inputs `input_ids` int32 [1, 1] and `position` int32
    [1], and the output `logits` float32 [1, 1, vocabulary]. Runner keeps its states, Runner.reset starts a new text.
    Raises UserError when the model does not fit, ExportError when the conversion fails.
    """
    limit = getattr(model.config, "max_position_embeddings", max_length)
    if not 1 <= max_length <= limit:
        raise UserError(f"Core AI export with a cache: max_length {max_length} must be 1 to {limit}, the model's limit")
    if is_quantized(model) or model.dtype != torch.float32 or not model.can_generate():
        raise UserError(
            f"Core AI export with a cache needs a plain float32 causal LM, got {type(model).__name__} of {model.dtype}"
        )
    training, held = model.training, records.of(model)
    step = _Step(model, max_length).eval()
    example = (torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    try:
        with torch.no_grad(), quiet(), traceable_masks(MASKED), stored(model, held):
            graph = torch.export.export(step, example)
        with quiet():
            from coreai_torch import get_decomp_table

            graph = graph.run_decompositions(get_decomp_table())  # changes buffers: not under no_grad
    except Exception as error:
        raise ExportError(
            f"torch.export could not trace {type(model).__name__} with a cache: {str(error).strip()[-600:]}."
            " Export it without (export_coreai)"
        ) from error
    finally:
        model.train(training)
    program = converted(graph, model, ["input_ids", "position"], ["logits"], step.states)
    return write(program, model, folder, processor)


class _Step(nn.Module):
    """One token: (input_ids [1, 1], position [1]) -> logits; the cache is in buffers."""

    seen: Tensor

    def __init__(self, model: PreTrainedModel, max_length: int) -> None:
        super().__init__()
        self.model = model
        config = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.cache = StaticCache(config=config, max_cache_len=max_length)
        self.cache.early_initialization(1, heads, size, torch.float32, torch.device("cpu"))
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
            position_ids=position[None],
            past_key_values=self.cache,
            use_cache=True,
        )
        return (outputs.logits,)
