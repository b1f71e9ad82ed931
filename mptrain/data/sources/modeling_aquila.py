"""A causal language model of the kind that comes with its own code, after AquilaChat and the first LLaMA.

Rotary embeddings are a product of complex numbers, e^(i·position·frequency) · (x_even + i·x_odd). It keeps its keys and
values in a Cache of transformers, as everything that generates with one expects.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast


class AquilaConfig(PreTrainedConfig):
    model_type = "aquila-complex"

    def __init__(
        self,
        vocab_size: int = 384,
        hidden_size: int = 128,
        intermediate_size: int = 320,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        max_position_embeddings: int = 256,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10_000.0,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **others: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**others)


def rotations(positions: Tensor, size: int, theta: float) -> Tensor:
    """positions [b, n] to complex numbers of length 1, [b, n, size / 2]."""
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2, device=positions.device).float() / size)
    angles = positions[..., None].float() * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """x [b, n, heads, size], turns complex [b, n, size / 2]."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[:, :, None]).flatten(3).type_as(x)


class AquilaNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class AquilaAttention(nn.Module):
    def __init__(self, config: AquilaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads = layer, config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor, turns: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        shape = (*x.shape[:2], self.heads, self.head_size)
        query, key = (rotated(project(x).view(shape), turns) for project in (self.q_proj, self.k_proj))
        query, key, value = (t.transpose(1, 2) for t in (query, key, self.v_proj(x).view(shape)))
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        causal = mask is None and query.shape[2] > 1
        found = functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
        return self.o_proj(found.transpose(1, 2).reshape(x.shape))


class AquilaLayer(nn.Module):
    def __init__(self, config: AquilaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = AquilaAttention(config, layer)
        self.gate_proj, self.up_proj = (
            nn.Linear(config.hidden_size, config.intermediate_size, bias=False) for _ in range(2)
        )
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.input_norm, self.mlp_norm = (AquilaNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2))

    def forward(self, x: Tensor, turns: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        x = x + self.self_attn(self.input_norm(x), turns, mask, cache)
        y = self.mlp_norm(x)
        return x + self.down_proj(functional.silu(self.gate_proj(y)) * self.up_proj(y))


class AquilaForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = AquilaConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _tied_weights_keys: Any = {}

    def __init__(self, config: AquilaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([AquilaLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = AquilaNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, AquilaNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        x = self.embed_tokens(input_ids)
        if (self.config.use_cache if use_cache is None else use_cache) and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(input_ids.shape[1], device=x.device) + start)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        head_size = self.config.hidden_size // self.config.num_attention_heads
        turns = rotations(position_ids, head_size, self.config.rope_theta)
        for layer in self.layers:
            x = layer(x, turns, mask, past_key_values)
        logits = self.lm_head(self.norm(x))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **others)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
