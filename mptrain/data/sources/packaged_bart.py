"""packaged:bart-untrained: a small BART with random weights, and a tokenizer made from the packaged dates.

No registry has a small encoder-decoder that is fit to train on, so a recipe that needs one trains this one. It is made
once, from fixed seeds, and kept in the cache: 2 + 2 layers, 128 wide, tied embeddings, a byte-level BPE of 512 tokens
that splits digits, 1.1 million parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from mptrain.data.sources.packaged_dates import rows

VERSION = 1
SOURCE = None
_SPECIAL = ["<pad>", "</s>"]
_CONFIG: dict[str, Any] = {
    "vocab_size": 512,
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 512,
    "decoder_ffn_dim": 512,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "dropout": 0.0,
}


def make(source: Path | None, folder: Path) -> None:
    """Write the model to `folder`."""
    tokenizer([text for pair in rows() for text in pair]).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BartForConditionalGeneration(BartConfig(**_CONFIG))
    model.save_pretrained(folder)


def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE; each digit is a token, and a text ends with </s>."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=_CONFIG["vocab_size"],
            special_tokens=_SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        model_max_length=_CONFIG["max_position_embeddings"],
        model_input_names=["input_ids", "attention_mask"],
    )
