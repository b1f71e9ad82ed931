"""Small causal LMs of many families, and their greedy continuation by a runner with a cache."""

from __future__ import annotations

import numpy as np
import torch
import transformers as t

_SIZE = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZE |= {"intermediate_size": 48, "max_position_embeddings": 80, "initializer_range": 0.3}
SHARED = _SIZE | {"num_key_value_heads": 2, "pad_token_id": 0}
_GPT = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 80, "initializer_range": 0.3}
FAMILIES = {
    "gpt2": lambda: t.GPT2Config(**_GPT),
    "opt": lambda: t.OPTConfig(**_SIZE, ffn_dim=48, word_embed_proj_dim=32, init_std=0.3),
    "llama": lambda: t.LlamaConfig(**SHARED),
    "qwen2": lambda: t.Qwen2Config(**SHARED),
    "qwen3": lambda: t.Qwen3Config(**SHARED, head_dim=8),
    "mistral": lambda: t.MistralConfig(**SHARED, sliding_window=6),
    "gemma": lambda: t.GemmaConfig(**SHARED, head_dim=8),
    "phi": lambda: t.PhiConfig(**_SIZE),
    "gpt_neox": lambda: t.GPTNeoXConfig(**_SIZE),
}
OTHERS = {
    "gpt_neo": lambda: t.GPTNeoConfig(
        **{"vocab_size": 50, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "initializer_range": 0.3},
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=80,
    ),
    "bloom": lambda: t.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
    "falcon": lambda: t.FalconConfig(**_SIZE),
    "gptj": lambda: t.GPTJConfig(**_GPT, rotary_dim=4),
    "gemma2": lambda: t.Gemma2Config(**SHARED, head_dim=8, sliding_window=6),
    "gemma3": lambda: t.Gemma3TextConfig(**SHARED, head_dim=8, sliding_window=6),
    "phi3": lambda: t.Phi3Config(**SHARED),
    "cohere": lambda: t.CohereConfig(**SHARED),
    "glm4": lambda: t.Glm4Config(**SHARED, head_dim=8),
}
HYBRID = t.Qwen3NextConfig(**SHARED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LONGEST = 72
IDS = torch.randint(4, 50, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0  # padded on the left
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def made(config, **changes):
    """Weights large enough that attention matters."""
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(config, **changes).eval()


def continued(runner, prompt, mask, tokens):
    """Greedily, one token to a call after the prompt."""
    runner.reset()
    text, call = prompt, {"input_ids": prompt, "attention_mask": mask}
    for _ in range(tokens):
        following = torch.as_tensor(runner.step(call)["logits"][:, -1]).argmax(-1)[:, None]
        text, mask = torch.cat([text, following], 1), torch.cat([mask, torch.ones_like(following)], 1)
        call = {"input_ids": following, "attention_mask": mask}
    return text


GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def check_continues(runner, model):
    """64 greedy tokens are the model's, and so are logits token by token and of a text gone in whole."""
    expected = model.generate(IDS[:, :5], attention_mask=MASK[:, :5], max_new_tokens=64, **GREEDY)
    text = torch.randint(4, 50, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(text).logits.numpy()
    assert continued(runner, IDS[:, :5], MASK[:, :5], 64).equal(expected)
    runner.reset()
    calls = ({"input_ids": text[:, i : i + 1], "attention_mask": torch.ones(2, i + 1)} for i in range(64))
    steps = np.concatenate([runner.step(call)["logits"] for call in calls], 1)
    for found in (steps, runner({"input_ids": text})["logits"]):
        assert np.abs(found - whole).max() < 1e-4 * np.abs(whole).max()
