"""A tokenizer with pieces of words, of as many tokens as a model has."""

from __future__ import annotations

from itertools import product

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefgh"


def wordpiece(tokens: int) -> PreTrainedTokenizerFast:
    """Special tokens, letters, letters within words, and pairs of letters."""
    pieces = [*SPECIAL, *LETTERS, *(f"##{c}" for c in LETTERS), *map("".join, product(LETTERS, repeat=2))][:tokens]
    inner = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)
