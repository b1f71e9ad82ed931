"""A fast tokenizer with fewer tokens: which stay, and the tokenizer.json that says so.

Tokens keep the order of their ids. Special and added tokens stay, whatever the training split has; the rest by
`choose`. A text whose tokens all stayed has the same ones under their new ids (pieces.py).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer

from mptrain.compress.vocabulary.pieces import pieces_of
from mptrain.core.errors import ModelError, UserError

_MADE_ANEW = ("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
"""other forms of a vocabulary, that would speak against tokenizer.json"""


def check_fast(tokenizer: Any) -> None:
    """Raises ModelError for a tokenizer that has no tokenizer.json, or one whose pieces cannot be cut."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"vocabulary: {type(tokenizer).__name__} is no fast tokenizer, whose pieces could be cut; save one with"
            " AutoTokenizer, use_fast=True, or drop the stage"
        )
    pieces_of(_json(tokenizer)["model"])


def choose(
    tokenizer: Any, counts: Tensor, keep: Literal["used"] | int, named: Collection[int] = frozenset()
) -> list[int]:
    """The old ids of the tokens that stay, ascending.

    counts: int64 [tokens], how often each stands in the training split; those that it has not follow in the order of
    their ids, which is that of how common they were where the tokenizer was made. named: ids that the model's config
    names, which stay too. Raises UserError for a number below those that have to stay.
    """
    pieces = pieces_of(_json(tokenizer)["model"])
    ids = pieces.ids
    names = {number: piece for piece, number in ids.items()}
    found, unread = must_stay(tokenizer, keep)
    found |= {number for number in named if number in names}
    ranked = torch.argsort(counts, descending=True, stable=True).tolist()
    for number in ranked:
        if (counts[number] == 0 and keep == "used") or (keep != "used" and len(found) >= keep):
            break
        if number in names and not (counts[number] == 0 and number in unread):
            more = {ids[piece] for piece in pieces.closed([names[number]])}
            if keep == "used" or len(found) + len(more - found) <= keep:
                found |= more
    return sorted(found)


def must_stay(tokenizer: Any, keep: Literal["used"] | int) -> tuple[set[int], set[int]]:
    """Ids of the special tokens and of the pieces that others are spelled with; of those that no text has. Raises
    UserError for a number below the first."""
    data = _json(tokenizer)
    pieces = pieces_of(data["model"])
    ids = pieces.ids
    added = {entry["id"] for entry in data["added_tokens"]} | set(tokenizer.all_special_ids)
    added |= {ids[token] for token in _put_around(data.get("post_processor")) if token in ids}
    unread = {ids[piece] for piece in pieces.unread(partial(_words, tokenizer.backend_tokenizer.pre_tokenizer))}
    found = added | {ids[piece] for piece in pieces.stays()} - unread
    if keep != "used" and len(found) > keep:
        raise UserError(
            f"vocabulary.keep: {keep:,} is below the {len(found):,} special tokens and pieces that others are spelled"
            " with, which have to stay; raise it"
        )
    return found, unread


def _words(pre_tokenizer: Any, text: str) -> list[str]:
    return [text] if pre_tokenizer is None else [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]


def cut(tokenizer: Any, kept: list[int]) -> Any:
    """A tokenizer of the same class with these tokens alone. kept: of `choose`."""
    data = _json(tokenizer)
    new = {old: number for number, old in enumerate(kept)}
    pieces = pieces_of(data["model"])
    names = {piece: new[number] for piece, number in pieces.ids.items() if number in new}
    names |= {entry["content"]: new[entry["id"]] for entry in data["added_tokens"]}
    data["model"] = pieces.cut({piece: number for piece, number in names.items() if piece in pieces.ids})
    for entry in data["added_tokens"]:
        entry["id"] = new[entry["id"]]
    data["post_processor"] = _renumbered(data.get("post_processor"), names)
    if data.get("padding"):
        data["padding"]["pad_id"] = new[data["padding"]["pad_id"]]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for name in _MADE_ANEW:
            (Path(folder) / name).unlink(missing_ok=True)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        _renumber_config(Path(folder) / "tokenizer_config.json", new)
        made = AutoTokenizer.from_pretrained(folder)
    made.model_input_names = tokenizer.model_input_names
    return made


def _json(tokenizer: Any) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _put_around(value: Any) -> set[str]:
    """Tokens that a post-processor adds to a text."""
    if isinstance(value, dict):
        own = value.get("tokens")
        return set(own if isinstance(own, list) else ()).union(*map(_put_around, value.values()))
    if isinstance(value, list):
        if len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int):
            return {value[0]}
        return set().union(*map(_put_around, value))
    return set()


def _renumbered(value: Any, names: Mapping[str, int]) -> Any:
    """Of a post-processor: lists of ids beside their tokens, and pairs of a token and its id."""
    if isinstance(value, dict):
        found = {key: _renumbered(inner, names) for key, inner in value.items()}
        if isinstance(value.get("ids"), list) and isinstance(value.get("tokens"), list):
            found["ids"] = [names[token] for token in value["tokens"]]
        return found
    if isinstance(value, list):
        if len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int):
            return [value[0], names[value[0]]]
        return [_renumbered(inner, names) for inner in value]
    return value


def _renumber_config(path: Path, new: Mapping[int, int]) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    if "added_tokens_decoder" in config:
        decoder = config["added_tokens_decoder"]
        config["added_tokens_decoder"] = {str(new[int(old)]): entry for old, entry in decoder.items()}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
