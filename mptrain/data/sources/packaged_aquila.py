"""packaged:aquila-untrained: a small model of an architecture that transformers does not know, with its own code.

What a user has who was given a folder with a modeling file: config.json names a model type of its own, the code is in
modeling_aquila.py beside it (`modeling: modeling_aquila.py`), and the tokenizer, of bytes, is not a fast one. Random
weights from a fixed seed: 4 layers, 128 wide, 0.7 million parameters.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import ByT5Tokenizer

from mptrain.data.sources import modeling_aquila

VERSION = 1
SOURCE = "film-reviews"
CODE = "modeling_aquila.py"
_CONFIG: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def make(reviews: Path, folder: Path) -> None:
    """Write the model to `folder`. reviews: the data that it is for."""
    ByT5Tokenizer(model_max_length=_CONFIG["max_position_embeddings"]).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = modeling_aquila.AquilaForCausalLM(modeling_aquila.AquilaConfig(**_CONFIG))
    model.save_pretrained(folder)
    shutil.copy(Path(modeling_aquila.__file__), folder / CODE)
