"""packaged:opt-untrained: a small OPT with random weights, and a tokenizer made from the packaged film reviews.

No registry has a small trained OPT, so recipes that need one train this one first. It is made
once, from fixed seeds, and kept in the cache: 4 layers, 128 wide, tied embeddings, a byte-level
BPE of 2,048 tokens, 1.1 million parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from mptrain.data.sources.film_reviews import read_film_reviews

VERSION = 1
SOURCE = "film-reviews"
_CONFIG: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "word_embed_proj_dim": 128,
    "num_hidden_layers": 4,
    "ffn_dim": 512,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "dropout": 0.0,
}
_SPECIAL = ["<pad>", "</s>"]


def make(reviews: Path, folder: Path) -> None:
    """Write the model to `folder`, from the file of film reviews."""
    table, _ = read_film_reviews(reviews)
    tokenizer(table["text"], _CONFIG["vocab_size"], _CONFIG["max_position_embeddings"]).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = OPTForCausalLM(OPTConfig(**_CONFIG))
    model.save_pretrained(folder)


def tokenizer(texts: list[str], words: int, length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of so many tokens, for a model that reads `length` of them; it adds no special tokens, text is
    one stream."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=words,
            special_tokens=_SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="</s>",
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"],
    )
