"""A tiny random model of every supported family, with inputs. Weights are spread so that every unit matters."""

from __future__ import annotations

from typing import Any

import torch
import transformers as t
from torch import Tensor, nn

FAMILIES = ("bert", "roberta", "distilbert", "vit", "wav2vec2", "swin", "opt", "llama")
RELATIVES = ("xlm-roberta", "camembert", "deit", "hubert")
"""built like one of the families"""

_TEXT = {"vocab_size": 50, "max_position_embeddings": 40}
_BERT_LIKE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_labels": 3,
}


def _config(family: str) -> tuple[Any, type]:
    if family == "bert":
        return t.BertConfig(**_BERT_LIKE, **_TEXT), t.BertForSequenceClassification
    if family == "roberta":
        return t.RobertaConfig(**_BERT_LIKE, **_TEXT), t.RobertaForSequenceClassification
    if family == "xlm-roberta":
        return t.XLMRobertaConfig(**_BERT_LIKE, **_TEXT), t.XLMRobertaForSequenceClassification
    if family == "camembert":
        return t.CamembertConfig(**_BERT_LIKE, **_TEXT), t.CamembertForSequenceClassification
    if family == "distilbert":
        config = t.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, num_labels=3, **_TEXT)
        return config, t.DistilBertForSequenceClassification
    if family == "vit":
        return t.ViTConfig(**_BERT_LIKE, image_size=16, patch_size=4), t.ViTForImageClassification
    if family == "deit":
        return t.DeiTConfig(**_BERT_LIKE, image_size=16, patch_size=4), t.DeiTForImageClassification
    if family in ("wav2vec2", "hubert"):
        config = (t.Wav2Vec2Config if family == "wav2vec2" else t.HubertConfig)(
            **_BERT_LIKE,
            vocab_size=20,
            conv_dim=(8, 8),
            conv_stride=(5, 4),
            conv_kernel=(5, 4),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            classifier_proj_size=8,
            layerdrop=0.0,
            apply_spec_augment=False,
        )
        return (
            config,
            t.Wav2Vec2ForSequenceClassification if family == "wav2vec2" else t.HubertForSequenceClassification,
        )
    if family == "swin":
        config = t.SwinConfig(
            image_size=16, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4, num_labels=3
        )
        return config, t.SwinForImageClassification
    if family == "gpt2":
        return t.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=40), t.GPT2LMHeadModel
    if family == "opt":
        config = t.OPTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32, **_TEXT
        )
        return config, t.OPTForCausalLM
    config = t.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        **_TEXT,
    )
    return config, t.LlamaForCausalLM


def tiny(family: str, attn: str = "sdpa", cls: type | None = None, seed: int = 0, **changes: Any) -> Any:
    """A model in eval mode; Swin has eager attention only."""
    config, default = _config(family)
    for key, value in changes.items():
        setattr(config, key, value)
    config._attn_implementation = "eager" if family == "swin" else attn
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = (cls or default)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def inputs(family: str, batch: int = 3, labels: bool = False, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if family in ("vit", "deit", "swin"):
        found = {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    elif family in ("wav2vec2", "hubert"):
        found = {"input_values": torch.randn(batch, 400, generator=generator)}
    else:
        ids = torch.randint(4, 50, (batch, 9), generator=generator)
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found["attention_mask"][0, 6:] = 0
    if labels:
        causal = family in ("opt", "llama", "gpt2")
        found["labels"] = found["input_ids"] if causal else torch.randint(0, 3, (batch,), generator=generator)
    return found


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def train(model, ours, steps, start=0, opt=None):
    """Steps as a Trainer makes them, with a compressor; returns the optimizer to go on with."""
    opt = opt or torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(start, start + steps):
        opt.zero_grad()
        model(**inputs("bert", labels=True, seed=step)).loss.backward()
        ours.gradients(True)
        opt.step()
        ours.updated(step + 1)
    return opt
