"""packaged:dien: a deep interest evolution network as code (dien.py), and a tokenizer of the packaged clicks.

What a user has who wrote a click model in plain torch: a file with a function that builds it (`module: dien.py:dien`),
with random weights. Of a pair, the tokens are the item and then its history; what is too long loses its oldest.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from mptrain.data.sources.packaged_clicks import ITEMS, name

VERSION = 1
SOURCE = None
CODE = "dien.py"
PAD, UNKNOWN, EMPTY = "[PAD]", "[UNK]", "[NONE]"
LONGEST = 512


def make(source: Path | None, folder: Path) -> None:
    """Write code and tokenizer to `folder`."""
    words = [PAD, UNKNOWN, EMPTY, *map(name, range(ITEMS))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[EMPTY],
        model_max_length=LONGEST,
        padding_side="right",
        truncation_side="left",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    shutil.copy(Path(__file__).with_name(CODE), folder / CODE)
