"""A tiny XLNet: the class is read at the last place, so padding is on the left, with a segment of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, XLNetConfig, XLNetForSequenceClassification

from kit.tiny import WORDS

SPECIAL = ["<pad>", "<unk>", "<sep>", "<cls>"]


def tokenizer(side: str = "left") -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="$A:0 <sep>:0 <cls>:2", pair="$A:0 <sep>:0 $B:1 <sep>:1 <cls>:2",
        special_tokens=[("<sep>", 2), ("<cls>", 3)],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        sep_token="<sep>",
        cls_token="<cls>",
        padding_side=side,
        pad_token_type_id=3,
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def model() -> XLNetForSequenceClassification:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = XLNetConfig(
            vocab_size=len(SPECIAL) + len(WORDS), d_model=32, n_layer=2, n_head=4, d_inner=48, pad_token_id=0
        )
        made = XLNetForSequenceClassification(config)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def save(folder: Path, side: str = "left") -> Path:
    model().save_pretrained(folder)
    tokenizer(side).save_pretrained(folder)
    return folder
