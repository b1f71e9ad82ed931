"""Which pieces of a vocabulary may go, so that every text still has pieces, and the same ones where they stayed.

    WordPiece   a piece may go whose characters are pieces themselves: what it stood for is spelled with shorter ones.
                The longest piece that fits is taken, so a text whose pieces all stay has the same ones.
    BPE         what merges make may go; the base letters (or bytes) stay, and with a piece what each of its merges
                joins (a vocabulary made from Unigram's has several to a piece, and which acts the word decides). Merges
                of pieces that stay keep their order, so a text whose pieces all stay has the same ones: each was built
                from pieces that stayed.
    Unigram     a piece may go whose characters are pieces themselves. The likeliest spelling of those left is taken:
                where it stayed it is still the likeliest. Pieces of bytes stay where characters fall back to them.

A vocabulary of whole words (WordLevel) has nothing to spell a word with and is refused.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

from mptrain.core.errors import ModelError

_BYTE = re.compile("<0x[0-9A-F]{2}>")


class Pieces(ABC):
    """The `model` of a tokenizer.json."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.model = model

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each piece."""
        return dict(self.model["vocab"])

    @abstractmethod
    def stays(self) -> set[str]:
        """Pieces that others are spelled with, or that cannot be spelled with others."""

    def closed(self, kept: Iterable[str]) -> set[str]:
        """With the pieces that these are built from."""
        return set(kept)

    def unread(self, words: Callable[[str], list[str]]) -> set[str]:
        """Pieces that no text has, such as places kept free: they are cut where none may be. words: a text cut into
        words, spelled as the pieces are."""
        return set()

    def cut(self, new: Mapping[str, int]) -> dict[str, Any]:
        """The model with these pieces and ids alone. new: ascending in the order of the old ids."""
        return {**self.model, "vocab": {piece: new[piece] for piece in self.model["vocab"] if piece in new}}


class WordPiece(Pieces):
    def stays(self) -> set[str]:
        prefix = self.model["continuing_subword_prefix"]
        inner = {p.removeprefix(prefix) for p in self.ids if p.startswith(prefix) and len(p) == len(prefix) + 1}
        first = {p for p in self.ids if len(p) == 1}
        found = set()
        for piece in self.ids:
            rest = piece.removeprefix(prefix) if piece.startswith(prefix) else piece[1:]
            begins = piece.startswith(prefix) or piece[:1] in first
            if len(piece.removeprefix(prefix)) == 1 or not begins or not set(rest) <= inner:
                found.add(piece)
        return found

    def unread(self, words: Callable[[str], list[str]]) -> set[str]:
        prefix, found = self.model["continuing_subword_prefix"], set()
        for piece in self.ids:
            cut = [piece] if piece.startswith(prefix) else words(piece)
            if len(cut) > 1 and "".join(cut) == piece:  # words that are spelled otherwise, as in bytes, tell nothing
                found.add(piece)
        return found


class Bpe(Pieces):
    @cached_property
    def _merges(self) -> list[tuple[str, str]]:
        return [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in self.model["merges"]]

    def _joined(self, left: str, right: str) -> str:
        return left + right.removeprefix(self.model.get("continuing_subword_prefix") or "")

    @cached_property
    def _parts(self) -> dict[str, list[str]]:
        """Of each piece that merges make what they join."""
        parts: dict[str, list[str]] = {}
        for left, right in self._merges:
            parts.setdefault(self._joined(left, right), []).extend((left, right))
        return parts

    def stays(self) -> set[str]:
        return {piece for piece in self.ids if piece not in self._parts}

    def closed(self, kept: Iterable[str]) -> set[str]:
        found: set[str] = set()
        waiting = list(kept)
        while waiting:
            piece = waiting.pop()
            if piece not in found:
                found.add(piece)
                waiting += self._parts.get(piece, ())
        return found

    def cut(self, new: Mapping[str, int]) -> dict[str, Any]:
        merges = [
            merge
            for merge, (left, right) in zip(self.model["merges"], self._merges)
            if left in new and right in new and self._joined(left, right) in new
        ]
        return {**super().cut(new), "merges": merges}


class Unigram(Pieces):
    @cached_property
    def ids(self) -> dict[str, int]:
        return {piece: place for place, (piece, _) in enumerate(self.model["vocab"])}

    def stays(self) -> set[str]:
        single = {piece for piece in self.ids if len(piece) == 1}
        found = {piece for piece in self.ids if len(piece) == 1 or not set(piece) <= single}
        bytes_ = {piece for piece in self.ids if _BYTE.fullmatch(piece)} if self.model.get("byte_fallback") else set()
        return found | bytes_ | self._unknown()

    def _unknown(self) -> set[str]:
        place = self.model.get("unk_id")
        return set() if place is None else {self.model["vocab"][place][0]}

    def cut(self, new: Mapping[str, int]) -> dict[str, Any]:
        vocab = [entry for entry in self.model["vocab"] if entry[0] in new]
        return {**self.model, "vocab": vocab, "unk_id": next((new[piece] for piece in self._unknown()), None)}


PIECES: dict[str, type[Pieces]] = {"WordPiece": WordPiece, "BPE": Bpe, "Unigram": Unigram}
"""by `type` of the model in a tokenizer.json"""


def pieces_of(model: Mapping[str, Any]) -> Pieces:
    """Raises ModelError for a model that has nothing to spell a word with."""
    kind = str(model.get("type"))
    if kind not in PIECES:
        raise ModelError(
            f"vocabulary: the tokenizer is a {kind}, which has no smaller pieces for a word that is cut;"
            f" {', '.join(PIECES)} have. Drop the stage"
        )
    return PIECES[kind](model)
