"""packaged:gpt2-untrained: a small GPT-2 with random weights, and a tokenizer made from the packaged film reviews.

Made once, from fixed seeds, and kept in the cache: 4 layers, 256 wide, tied embeddings, a byte-level BPE of 8,192
tokens, 5.3 million parameters. Its vocabulary is large for its size, as that of language models is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mptrain.data.sources.film_reviews import read_film_reviews
from mptrain.data.sources.packaged_opt import tokenizer

VERSION = 1
SOURCE = "film-reviews"
_CONFIG: dict[str, Any] = {
    "vocab_size": 8192,
    "n_embd": 256,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


def make(reviews: Path, folder: Path) -> None:
    """Write the model to `folder`, from the file of film reviews."""
    table, _ = read_film_reviews(reviews)
    tokenizer(table["text"], _CONFIG["vocab_size"], _CONFIG["n_positions"]).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**_CONFIG))
    model.save_pretrained(folder)
