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
        description="used: the tokens of the training split; a number: the commonest of them. Special tokens and what"
        " others are spelled with stay beside these",
    )

    def words(self) -> str:
        return (
            "vocabulary cut to the tokens in use" if self.keep == "used" else f"vocabulary cut to {self.keep:,} tokens"
        )

    def needs(self) -> frozenset[Need]:
        return frozenset({"inputs"})
