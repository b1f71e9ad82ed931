"""Fewer tokens: `vocabulary` of a stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mptrain.recipe.method import MethodConfig, Need


class Vocabulary(MethodConfig):
    """Tokens that training never uses leave the embeddings, a tied head, and the tokenizer."""

    field = "vocabulary"
    by = "method"
    tag = "vocabulary pruning"
    alone = True
    reshapes = True
    rewrites = True

    method: Literal["cut"] = "cut"
    keep: Literal["used"] | Annotated[int, Field(gt=0)] = Field(
        "used",
        description="used: the tokens of the training split; a number: the commonest of them, and beyond them those"
        " that come first in the tokenizer. Special tokens and what others are spelled with stay in any case",
    )
    rank: Annotated[int, Field(gt=0, multiple_of=16)] | None = Field(
        None,
        description="the embedding becomes a product: so many numbers to a token, and a layer that widens them. They"
        " are the directions in which the tokens that are read differ most. A table that has no more stays as it is",
    )

    def words(self) -> str:
        kept = "the tokens in use" if self.keep == "used" else f"{self.keep:,} tokens"
        return f"vocabulary cut to {kept}{f', their embedding of rank {self.rank}' if self.rank else ''}"

    def needs(self) -> frozenset[Need]:
        return frozenset({"inputs"})
